//! The devices under test: the shim, with small shapes, and a GPU, with those of the model.

use std::sync::Arc;

use ett::backend::{Kernels, Precision};

use super::{Size, reject, run};
use crate::common::{gpu, gpu_forcing, open_shim, shim, shim_forcing};
use crate::contract::refusals;

const BOTH: [Precision; 2] = [Precision::F32, Precision::BF16];

/// Cases that the CUDA kernels refuse: head dimensions above 512, and codes whose dimension is not a multiple of 8 up
/// to 512.
const LIMITS: [&str; 3] = ["attention_fwd: head_dim", "attention_bwd: head_dim", "nearest: `z`"];

/// Every implementation that is not the default for all shapes.
const FORCED: [(&str, &str); 39] = [
    ("matmul", "large"),
    ("matmul", "small"),
    ("matmul_acc", "large"),
    ("matmul_acc", "small"),
    ("linear_gelu", "large"),
    ("linear_gelu", "small"),
    ("conv2d_fwd", "plain"),
    ("conv2d_fwd", "large"),
    ("conv2d_fwd", "medium"),
    ("conv2d_fwd", "small"),
    ("conv2d_bwd_data", "plain"),
    ("conv2d_bwd_data", "large"),
    ("conv2d_bwd_data", "medium"),
    ("conv2d_bwd_data", "small"),
    ("conv2d_bwd_weight", "narrow"),
    ("conv2d_bwd_weight", "large"),
    ("conv2d_bwd_weight", "exchanged"),
    ("nearest", "simple"),
    ("attention_fwd", "simple"),
    ("attention_bwd", "simple"),
    ("rms_norm_fwd", "plain"),
    ("rms_norm_bwd", "plain"),
    ("layer_norm_fwd", "plain"),
    ("layer_norm_bwd", "plain"),
    ("l2_norm_fwd", "plain"),
    ("l2_norm_bwd", "plain"),
    ("group_norm_fwd", "plain"),
    ("group_norm_bwd", "plain"),
    ("batch_norm_fwd", "plain"),
    ("batch_norm_bwd", "plain"),
    ("batch_norm_eval_fwd", "plain"),
    ("batch_norm_eval_bwd", "plain"),
    ("lpips_fwd", "plain"),
    ("lpips_bwd", "plain"),
    ("gan_generator_fwd", "plain"),
    ("gan_generator_bwd", "plain"),
    ("xent_fwd", "plain"),
    ("adamw", "plain"),
    ("sum_squares", "plain"),
];

fn forced(with: fn(&str) -> Arc<dyn Kernels>, prec: Precision, size: Size) {
    for (op, kernel) in FORCED {
        let dev = with(&format!("{op}={kernel}"));
        // An implementation may refuse some calls, but not all.
        let not_for_it = format!("{op}: the implementation `{kernel}`");
        run(&*dev, prec, size, Some(&[op])).expect(&[&LIMITS[..], &[&not_for_it]].concat());
    }
}

#[test]
#[ignore = "needs the shim"]
fn shim_f32() {
    run(&*shim(), Precision::F32, Size::Shim, None).expect(&LIMITS);
}

#[test]
#[ignore = "needs the shim"]
fn shim_bf16() {
    run(&*shim(), Precision::BF16, Size::Shim, None).expect(&LIMITS);
}

#[test]
#[ignore = "needs the shim"]
fn shim_forced() {
    for prec in BOTH {
        forced(shim_forcing, prec, Size::Sanitizer);
    }
}

#[test]
#[ignore = "needs the shim"]
fn shim_refuses_wrong_arguments() {
    let dev = open_shim("");
    for prec in BOTH {
        reject::run_asking(&dev, prec, None, Some(&|| dev.last_query())).expect(&[]);
    }
    refusals(shim());
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_f32() {
    run(&*gpu(), Precision::F32, Size::Full, None).expect(&LIMITS);
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_bf16() {
    run(&*gpu(), Precision::BF16, Size::Full, None).expect(&LIMITS);
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_forced() {
    for prec in BOTH {
        forced(gpu_forcing, prec, Size::Tiny);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_refuses_wrong_arguments() {
    for prec in BOTH {
        reject::run(&*gpu(), prec, None).expect(&[]);
    }
    refusals(gpu());
}

/// One minimal case of every instantiation, for compute-sanitizer.
#[test]
#[ignore = "needs a GPU"]
fn gpu_sanitizer() {
    for prec in BOTH {
        run(&*gpu(), prec, Size::Sanitizer, None).expect(&LIMITS);
        forced(gpu_forcing, prec, Size::Sanitizer);
    }
}
