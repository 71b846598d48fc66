//! The devices under test: the shim, with small shapes, and a GPU, with those of the model.

use std::sync::Arc;

use ett::backend::{Kernels, Precision};

use super::interface::implementations;
use super::{NOTHING, Size, TABLE, reject, run};
use crate::common::{gpu, gpu_forcing, open_shim, shim, shim_forcing};
use crate::contract::refusals;

const BOTH: [Precision; 2] = [Precision::F32, Precision::BF16];

/// Cases that the CUDA kernels refuse: head dimensions above 512, and codes whose dimension is not a multiple of 8 up
/// to 512.
const LIMITS: [&str; 3] = ["attention_fwd: head_dim", "attention_bwd: head_dim", "nearest: `z`"];

/// Tests every implementation of the kernels that have several.
fn forced(with: fn(&str) -> Arc<dyn Kernels>, prec: Precision, size: Size) {
    for kernel in TABLE {
        let op = kernel.name;
        let all = implementations(&*with(&format!("{op}=none")), kernel);
        for one in all.iter().filter(|_| all.len() > 1) {
            let dev = with(&format!("{op}={one}"));
            // An implementation may refuse calls.
            let not_for_it = format!("{op}: the implementation `{one}`");
            let found = run(&*dev, prec, size, Some(&[op]));
            let complaints = found.complaints(&[&LIMITS[..], &[&not_for_it]].concat());
            // One for bf16 only refuses every call in f32.
            let complaints: Vec<_> = complaints.into_iter().filter(|c| c != NOTHING).collect();
            assert!(complaints.is_empty(), "{op}={one} in {}:\n{}", prec.act, complaints.join("\n"));
        }
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
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_f32() {
    run(&*gpu(), Precision::F32, Size::Full, None).expect(&LIMITS);
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_bf16() {
    run(&*gpu(), Precision::BF16, Size::Full, None).expect(&LIMITS);
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_forced() {
    for prec in BOTH {
        forced(gpu_forcing, prec, Size::Tiny);
    }
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_refuses_wrong_arguments() {
    for prec in BOTH {
        reject::run(&*gpu(), prec, None).expect(&[]);
    }
    refusals(gpu());
}

/// One minimal case of every instantiation, for compute-sanitizer.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_sanitizer() {
    for prec in BOTH {
        run(&*gpu(), prec, Size::Sanitizer, None).expect(&LIMITS);
        forced(gpu_forcing, prec, Size::Sanitizer);
    }
}
