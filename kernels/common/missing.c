/* missing.c: kernels of the interface that have no CUDA implementation yet. Their queries return 0 for
   any arguments, so that a step that needs these kernels can be planned. */
#include "status.h"

#define MISSING(op)                                                                                              \
    int64_t ett_##op##_workspace(const ett_##op##_args* args) { return args ? 0 : -1; }                          \
    int32_t ett_##op(const ett_##op##_args* args, const ett_launch* launch) {                                    \
        (void)args, (void)launch;                                                                                \
        return ett_fail(ETT_UNSUPPORTED, 0, #op, "args", "for a kernel without a CUDA implementation", "a kernel with one");  \
    }

MISSING(conv2d_fwd)
MISSING(conv2d_bwd_data)
MISSING(conv2d_bwd_weight)
