/* kernels.c: what the library contains. A test on the shim compares the table with the names that launchers accept. */
#include <stddef.h>
#include <string.h>

#include "ett_kernels.h"

/* The build defines it: compute capabilities, separated by spaces. */
#ifndef ETT_TARGETS
#define ETT_TARGETS ""
#endif

/* In the order of the header; an implementation stands before those that it is preferred to. */
static const struct {
    const char* name;
    const char* implementations;
} kernels[] = {
    {"matmul", "hopper large small"},
    {"linear_gelu", "hopper large small"},
    {"matmul_acc", "hopper large small"},
    {"col_sum", "wide plain"},
    {"conv2d_fwd", "hopper few first halo large medium small plain"},
    {"conv2d_bwd_data", "hopper few first halo large medium small plain"},
    {"conv2d_bwd_weight", "hopper exchanged halo large narrow"},
    {"upsample2x_weights_fwd", "plain"},
    {"upsample2x_weights_bwd", "plain"},
    {"upsample2x_fwd", "wide plain"},
    {"upsample2x_bwd", "wide plain"},
    {"max_pool2x2_fwd", "wide plain"},
    {"max_pool2x2_bwd", "wide plain"},
    {"group_norm_fwd", "wide plain"},
    {"group_norm_stats", "wide plain"},
    {"group_norm_bwd", "wide plain"},
    {"rms_norm_fwd", "wide plain"},
    {"rms_norm_bwd", "wide plain"},
    {"layer_norm_fwd", "wide plain"},
    {"layer_norm_bwd", "wide plain"},
    {"batch_norm_fwd", "wide plain"},
    {"batch_norm_bwd", "wide plain"},
    {"batch_norm_eval_fwd", "wide plain"},
    {"batch_norm_eval_bwd", "wide plain"},
    {"batch_norm_merge", "plain"},
    {"batch_norm_merged_bwd", "wide plain"},
    {"batch_norm_running", "plain"},
    {"l2_norm_fwd", "wide plain"},
    {"l2_norm_bwd", "wide plain"},
    {"unary_fwd", "wide plain"},
    {"unary_bwd", "wide plain"},
    {"add", "wide plain"},
    {"accumulate", "wide plain"},
    {"cast", "wide plain"},
    {"scale_bytes", "wide plain"},
    {"fill", "wide plain"},
    {"channel_affine_fwd", "wide plain"},
    {"channel_affine_bwd", "wide plain"},
    {"swiglu_fwd", "wide plain"},
    {"swiglu_bwd", "wide plain"},
    {"rope", "wide plain"},
    {"gather_fwd", "wide plain"},
    {"gather_bwd", "wide plain"},
    {"put_rows", "wide plain"},
    {"pick", "wide plain"},
    {"count_up", "plain"},
    {"arange", "wide plain"},
    {"attention_fwd", "split mma simple"},
    {"attention_bwd", "mma simple"},
    {"linear_xent_fwd", "sweep"},
    {"linear_xent_bwd", "chunks"},
    {"xent_fwd", "wide plain"},
    {"xent_bwd", "wide plain"},
    {"l1_fwd", "wide plain"},
    {"l1_bwd", "wide plain"},
    {"lpips_fwd", "wide plain"},
    {"lpips_bwd", "wide plain"},
    {"gan_generator_fwd", "wide plain"},
    {"gan_generator_bwd", "wide plain"},
    {"hinge_fwd", "wide plain"},
    {"hinge_bwd", "wide plain"},
    {"lecam_update", "wide plain"},
    {"lecam_fwd", "wide plain"},
    {"lecam_bwd", "wide plain"},
    {"sample", "plain"},
    {"nearest", "hopper hopper_split wide narrow simple"},
    {"ibq_rows", "hopper hopper_split sweep"},
    {"ibq_cols", "hopper hopper_split sweep"},
    {"ibq_losses", "rows"},
    {"ibq_bwd", "hopper hopper_split chunks"},
    {"vq_losses", "rows"},
    {"vq_bwd", "wide plain"},
    {"sum_squares", "wide plain"},
    {"adamw", "wide plain"},
    {"restore", "wide plain"},
};

const char* ett_targets(void) {
    return ETT_TARGETS;
}

const char* ett_implementations(const char* kernel) {
    for (size_t i = 0; kernel && i < sizeof kernels / sizeof kernels[0]; ++i)
        if (strcmp(kernels[i].name, kernel) == 0) return kernels[i].implementations;
    return NULL;
}
