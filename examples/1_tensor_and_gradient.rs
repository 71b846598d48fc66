//! Tensors, the tape and a gradient: `cargo run --release --example 1_tensor_and_gradient`.
//!
//! `y = x w^T` for x `[2, 3]` and w `[4, 3]`, then the gradient of the sum of `silu(y)`, which is compared with finite
//! differences.

use std::error::Error;
use std::sync::Arc;

use ett::autograd::Tape;
use ett::backend::{Cpu, DType, Kernels, Precision, Role, Unary};
use ett::ops;
use ett::tensor::Tensor;

/// Ends the example, and the test that runs it, with the error.
pub fn main() -> Result<(), Box<dyn Error>> {
    // A device is a `dyn Kernels`; `ett::backend::open` opens one by name. 0 threads: one per core.
    let dev: Arc<dyn Kernels> = Arc::new(Cpu::new(0)?);
    let x = [0.5, -1.0, 2.0, 1.5, 0.25, -0.75];
    let w: Vec<f64> = (0..12).map(|i| 0.1 * f64::from(i) - 0.5).collect();
    let tensor = |values: &[f64], rows| Tensor::from_f64(&*dev, Role::Input, DType::F64, values, [rows, 3]);

    // A tape records what the backward pass needs. A leaf has a gradient, a constant has none.
    let tape = Tape::new(dev.clone(), Precision::F64);
    let leaf = tape.leaf(tensor(&x, 2)?);
    let y = ops::linear(&tape, &leaf, &tape.constant(tensor(&w, 4)?), None)?;
    let y = ops::unary(&tape, &y, Unary::Silu)?;
    println!("silu(x w^T) = {:.3?}, {} {}", y.value().to_f64(&*dev)?, y.dims(), y.value().dtype());

    // The gradient of a sum begins as ones.
    let ones = Tensor::from_f64(&*dev, Role::Activation, DType::F64, &[1.0; 8], y.dims())?;
    let dx = tape.backward(&[(&y, &ones)])?.take(&leaf)?.ok_or("x has no gradient, wanted one")?;
    let dx = dx.to_f64(&*dev)?;
    println!("gradient of its sum by x = {dx:.3?}");

    // A tape for inference records nothing.
    let sum = |x: &[f64]| -> ett::error::Result<f64> {
        let tape = Tape::inference(dev.clone(), Precision::F64);
        let y = ops::linear(&tape, &tape.constant(tensor(x, 2)?), &tape.constant(tensor(&w, 4)?), None)?;
        Ok(ops::unary(&tape, &y, Unary::Silu)?.value().to_f64(&*dev)?.iter().sum())
    };
    for (i, dx) in dx.iter().enumerate() {
        let moved = |by: f64| {
            let mut x = x;
            x[i] += by;
            sum(&x)
        };
        let difference = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
        assert!((difference - dx).abs() < 1e-8, "element {i}: {dx}, by differences {difference}");
    }
    println!("finite differences agree within 1e-8");
    Ok(())
}
