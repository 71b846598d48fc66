//! Random tensors and the loop that times a kernel.

use criterion::{Criterion, Throughput};
use ett::backend::{Args, Cpu, Role};
use ett::data::Philox;
use ett::error::Result;
use ett::tensor::{DType, Dims, Tensor};

/// Normal random values.
pub fn normal(dev: &Cpu, dtype: DType, dims: impl Into<Dims>, seed: u64) -> Tensor {
    let dims = dims.into();
    let mut rng = Philox::new(seed, 0);
    let values: Vec<f64> = (0..dims.numel()).map(|_| rng.normal()).collect();
    Tensor::from_f64(dev, Role::Activation, dtype, &values, dims).expect("memory for a bench")
}

/// A tensor to write.
pub fn out(dev: &Cpu, dtype: DType, dims: impl Into<Dims>) -> Tensor {
    Tensor::zeros(dev, Role::Activation, dtype, dims).expect("memory for a bench")
}

/// Times one kernel call; the name carries shape and type.
pub fn kernel(c: &mut Criterion, name: &str, args: &dyn Args, mut run: impl FnMut() -> Result<()>) {
    run().expect("the kernel accepts the bench's arguments");
    let mut group = c.benchmark_group(args.kernel());
    let cost = args.cost();
    group.throughput(match cost.flop {
        0 => Throughput::Bytes(cost.bytes),
        flop => Throughput::Elements(flop),
    });
    group.bench_function(name, |b| b.iter(|| run().expect("the kernel ran before")));
    group.finish();
}
