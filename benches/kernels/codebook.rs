use criterion::Criterion;
use ett::backend::{Cpu, IbqRows, Kernels, Metric, Nearest, Role, Stream};
use ett::tensor::{DType, Tensor};

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    let dtype = DType::F32;
    let (m, k, d) = (512, 16_384, 64);
    let (z, e) = (normal(&dev, dtype, [m, d], 1), normal(&dev, dtype, [k, d], 2));
    let idx = Tensor::empty(&dev, Role::Activation, DType::I32, [m]).expect("memory for a bench");
    let name = format!("{m} tokens x {k} codes x {d} {dtype}");
    let args = Nearest { z: z.view(), e: e.view(), idx: idx.out(), metric: Metric::Dot };
    kernel(c, &name, &args, || dev.nearest(Stream::COMPUTE, &args));
    let stat = || out(&dev, dtype, [m]);
    let (smax, rest_p, rest_q, xbar, bad) = (stat(), stat(), stat(), stat(), out(&dev, dtype, [1]));
    let args = IbqRows {
        z: z.view(),
        e: e.view(),
        idx: idx.out(),
        smax: smax.out(),
        rest_p: rest_p.out(),
        rest_q: rest_q.out(),
        xbar: xbar.out(),
        bad: bad.acc(),
        temperature: 0.01,
    };
    kernel(c, &name, &args, || dev.ibq_rows(Stream::COMPUTE, &args));
}
