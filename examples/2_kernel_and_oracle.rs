//! A kernel and its oracle: `cargo run --release --example 2_kernel_and_oracle`.
//!
//! Every kernel is a method of [`Kernels`] and takes a struct of views. The same call runs on the CPU in f32, on the CPU
//! in f64, which is the oracle of all tests, and on a GPU, if there is one.

use std::error::Error;

use ett::backend::{self, DType, Kernels, RmsNormFwd, Role, Stream};
use ett::compare::{Bounds, compare};
use ett::rng::Philox;
use ett::tensor::Tensor;

const ROWS: usize = 100;
const WIDTH: usize = 768;

/// RMSNorm of `x` `[ROWS, WIDTH]` with weights `w`, computed in `dtype` on a device.
fn rms_norm(dev: &dyn Kernels, dtype: DType, x: &[f64], w: &[f64]) -> ett::error::Result<Vec<f64>> {
    let x = Tensor::from_f64(dev, Role::Input, dtype, x, [ROWS, WIDTH])?;
    let w = Tensor::from_f64(dev, Role::Weight, dtype, w, [WIDTH])?;
    let y = Tensor::empty(dev, Role::Activation, dtype, [ROWS, WIDTH])?;
    let rstd = Tensor::empty(dev, Role::Activation, dtype, [ROWS])?;
    let args = RmsNormFwd {
        x: x.view(),
        residual: None,
        w: w.view(),
        sum: None,
        y: y.out(),
        rstd: rstd.out(),
        eps: 1e-6,
    };
    // Enqueued on the device; reading `y` waits for it.
    dev.rms_norm_fwd(Stream::COMPUTE, &args)?;
    y.to_f64(dev)
}

/// Ends the example, and the test that runs it, with the error.
pub fn main() -> Result<(), Box<dyn Error>> {
    let mut rng = Philox::new(1, 0);
    // Rounded to f32, so that all get the same inputs.
    let mut normal = |n| (0..n).map(|_| DType::F32.rounded(rng.normal())).collect::<Vec<f64>>();
    let (x, w) = (normal(ROWS * WIDTH), normal(WIDTH));

    let cpu = backend::open("cpu", 0)?;
    let oracle = rms_norm(&*cpu, DType::F64, &x, &w)?;
    let check = |dev: &dyn Kernels| -> Result<(), Box<dyn Error>> {
        let got = rms_norm(dev, DType::F32, &x, &w)?;
        let errors = compare("rms_norm", &got, &oracle, WIDTH, Bounds::of(DType::F32))?;
        println!("{} in f32: off by {:.1e} of the oracle's norm", dev.name(), errors.norm);
        Ok(())
    };
    check(&*cpu)?;
    match backend::open("cuda", 0) {
        Ok(gpu) => check(&*gpu)?,
        Err(why) => println!("not compared on a GPU: {why}"),
    }

    // Arguments are checked before anything is computed; the error says which one is wrong.
    let refused = rms_norm(&*cpu, DType::I32, &x, &w).map(|_| "no error").map_err(|e| e.to_string());
    let refused = refused.err().ok_or("RMSNorm of integers was computed, wanted an error")?;
    println!("of integers: {refused}");
    assert!(refused.contains("rms_norm_fwd: argument `x`"), "{refused}");
    Ok(())
}
