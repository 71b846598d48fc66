/* status.h: how launchers record their result. */
#ifndef ETT_STATUS_H
#define ETT_STATUS_H

#include "ett_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Records why the calling thread's launch failed and returns `code`. Strings are truncated to fit. */
int32_t ett_fail(int32_t code, int32_t cuda_error, const char* op, const char* arg, const char* got, const char* want);

/* Records which implementation (a string literal) was launched and returns ETT_OK. */
int32_t ett_done(const char* kernel);

#ifdef __cplusplus
}
#endif
#endif
