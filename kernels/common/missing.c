/* missing.c: kernels of the interface that have no CUDA implementation yet. */
#include "status.h"

#define MISSING(op)                                                                                              \
    int64_t ett_##op##_workspace(const ett_##op##_args* args) { return args ? 0 : -1; }                          \
    int32_t ett_##op(const ett_##op##_args* args, const ett_launch* launch) {                                    \
        (void)args, (void)launch;                                                                                \
        return ett_fail(ETT_UNSUPPORTED, 0, #op, "args", "a kernel without an implementation", "one that has one"); \
    }

MISSING(conv2d_fwd)
MISSING(conv2d_bwd_data)
MISSING(conv2d_bwd_weight)
MISSING(upsample2x_fwd)
MISSING(upsample2x_bwd)
MISSING(max_pool2x2_fwd)
MISSING(max_pool2x2_bwd)
MISSING(group_norm_fwd)
MISSING(group_norm_bwd)
MISSING(batch_norm_fwd)
MISSING(batch_norm_bwd)
MISSING(batch_norm_running)
MISSING(l1_fwd)
MISSING(l1_bwd)
MISSING(lpips_fwd)
MISSING(lpips_bwd)
MISSING(gan_generator_fwd)
MISSING(gan_generator_bwd)
MISSING(hinge_fwd)
MISSING(hinge_bwd)
MISSING(lecam_update)
MISSING(lecam_fwd)
MISSING(lecam_bwd)
