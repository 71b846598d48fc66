use criterion::Criterion;
use ett::backend::{Cpu, Kernels, Matmul, Stream};
use ett::tensor::DType;

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    for (dtype, n) in [(DType::F32, 512), (DType::F32, 1024), (DType::Bf16, 512), (DType::F64, 512)] {
        let (a, b, y) =
            (normal(&dev, dtype, [n, n], 1), normal(&dev, dtype, [n, n], 2), out(&dev, dtype, [n, n]));
        let args = Matmul { a: a.view(), b: b.view(), ta: false, tb: true, bias: None, y: y.out() };
        kernel(c, &format!("{n}x{n}x{n} {dtype}"), &args, || dev.matmul(Stream::COMPUTE, &args));
    }
}
