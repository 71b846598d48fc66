use criterion::Criterion;
use ett::backend::{Cpu, Kernels, LinearXentBwd, LinearXentFwd, Role, Stream};
use ett::data::Philox;
use ett::tensor::{DType, Tensor};

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    let dtype = DType::F32;
    let (n, width, v) = (256, 256, 16_384);
    let (x, w) = (normal(&dev, dtype, [n, width], 1), normal(&dev, dtype, [v, width], 2));
    let mut rng = Philox::new(3, 0);
    let ids: Vec<i32> = (0..n).map(|_| rng.below(v) as i32).collect();
    let target = Tensor::from_host(&dev, Role::Input, &ids, [n]).expect("memory for a bench");
    let one = Tensor::from_f64(&dev, Role::Input, dtype, &[1.0], [1]).expect("memory for a bench");
    let (lse, loss) = (out(&dev, dtype, [n]), out(&dev, dtype, [1]));
    let (dx, dw) = (out(&dev, dtype, [n, width]), out(&dev, dtype, [v, width]));
    let name = format!("N {n} C {width} V {v} {dtype}");
    let args = LinearXentFwd {
        x: x.view(),
        w: w.view(),
        target: target.view(),
        scale: one.view(),
        lse: lse.out(),
        loss: loss.out(),
    };
    kernel(c, &name, &args, || dev.linear_xent_fwd(Stream::COMPUTE, &args));
    let args = LinearXentBwd {
        x: x.view(),
        w: w.view(),
        target: target.view(),
        scale: one.view(),
        lse: lse.view(),
        g: one.view(),
        dx: dx.out(),
        dw: Some(dw.acc()),
    };
    kernel(c, &name, &args, || dev.linear_xent_bwd(Stream::COMPUTE, &args));
}
