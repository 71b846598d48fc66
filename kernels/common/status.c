/* status.c: names of status codes, and the layout that every caller of the library relies on. */
#include "ett_kernels.h"

/* Callers in other languages mirror these sizes. */
_Static_assert(sizeof(ett_view) == 56, "a view is a pointer, two 32-bit and five 64-bit integers");
_Static_assert(sizeof(ett_unary) == 16, "a function is a number and its parameter, 8-byte aligned");
_Static_assert(sizeof(ett_status) == 264, "a status is two numbers and four strings without gaps");
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

int32_t ett_abi_version(void) {
    return ETT_ABI_VERSION;
}
