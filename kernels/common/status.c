/* status.c: the status and the implementation of a thread's last launch, the names of status codes, and assertions
   on the struct layout that callers of the library rely on. */
#include "status.h"

#include <stdio.h>
#include <string.h>

/* Callers in other languages mirror these sizes. */
_Static_assert(sizeof(ett_view) == 56, "a view is a pointer, two 32-bit and five 64-bit integers");
_Static_assert(sizeof(ett_unary) == 16, "a function is a number and its parameter, 8-byte aligned");
_Static_assert(sizeof(ett_status) == 264, "a status is two numbers and four strings without gaps");
_Static_assert(sizeof(ett_launch) == 48, "a launch is three pointers, two numbers and a name");
_Static_assert(sizeof(ett_fault) == 32, "a fault is two 32-bit and three 64-bit integers");
_Static_assert(sizeof(ett_unary_fwd_args) == 2 * sizeof(ett_view) + sizeof(ett_unary), "no packing");

const char* ett_status_name(int32_t code) {
    switch (code) {
    case ETT_OK: return "ok";
    case ETT_BAD_ARGUMENT: return "bad argument";
    case ETT_UNSUPPORTED: return "unsupported";
    case ETT_CUDA_ERROR: return "CUDA error";
    default: return "unknown status";
    }
}

static _Thread_local ett_status last_status;
static _Thread_local const char* last_kernel = "";

int32_t ett_fail(int32_t code, int32_t cuda_error, const char* op, const char* arg, const char* got, const char* want) {
    last_status.code = code;
    last_status.cuda_error = cuda_error;
    snprintf(last_status.op, sizeof last_status.op, "%s", op);
    snprintf(last_status.arg, sizeof last_status.arg, "%s", arg);
    snprintf(last_status.got, sizeof last_status.got, "%s", got);
    snprintf(last_status.want, sizeof last_status.want, "%s", want);
    return code;
}

int32_t ett_done(const char* kernel) {
    last_kernel = kernel;
    return ETT_OK;
}

void ett_last_status(ett_status* status) {
    if (status) memcpy(status, &last_status, sizeof last_status);
}

const char* ett_last_kernel(void) {
    return last_kernel;
}

int32_t ett_abi_version(void) {
    return ETT_ABI_VERSION;
}

const char* ett_version(void) {
    return ETT_VERSION;
}
