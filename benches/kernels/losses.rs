use ett::backend::{Kernels, LinearXentBwd, LinearXentFwd, Role, Stream};
use ett::tensor::{DType, Tensor};

use crate::common::{Bench, acc, call, ids, normal, out, scaled};

pub fn benches(b: &mut Bench) {
    let shapes: &[[usize; 3]] =
        if b.gpu { &[[1024, 1536, 151_936], [8192, 1536, 131_072]] } else { &[[256, 256, 16_384]] };
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    for &[n, c, v] in shapes {
        let shape = format!("N {n} C {c} V {v}");
        b.kernel("linear_xent_fwd", &shape, dtype, &|dev, seed| {
            let (x, w) = (normal(dev, dtype, [n, c], seed)?, scaled(dev, dtype, [v, c], seed + 100, 0.03)?);
            let (target, one) = (ids(dev, n, v, seed)?, one(dev, dtype, n)?);
            let (lse, loss) = (out(dev, acc(dtype), [n])?, out(dev, acc(dtype), [1])?);
            let run = move |dev: &dyn Kernels| {
                let a = LinearXentFwd {
                    x: x.view(),
                    w: w.view(),
                    target: target.view(),
                    scale: one.view(),
                    lse: lse.out(),
                    loss: loss.out(),
                };
                call(&a, |a| dev.linear_xent_fwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        b.kernel("linear_xent_bwd", &shape, dtype, &|dev, seed| {
            let (x, w) = (normal(dev, dtype, [n, c], seed)?, scaled(dev, dtype, [v, c], seed + 100, 0.03)?);
            let (target, one) = (ids(dev, n, v, seed)?, one(dev, dtype, n)?);
            let (lse, loss) = (out(dev, acc(dtype), [n])?, out(dev, acc(dtype), [1])?);
            let (dx, dw) = (out(dev, dtype, [n, c])?, out(dev, acc(dtype), [v, c])?);
            let (x_, w_) = (x.view(), w.view());
            let (target_, scale) = (target.view(), one.view());
            let fwd =
                LinearXentFwd { x: x_, w: w_, target: target_, scale, lse: lse.out(), loss: loss.out() };
            dev.linear_xent_fwd(Stream::COMPUTE, &fwd)?;
            let run = move |dev: &dyn Kernels| {
                let a = LinearXentBwd {
                    x: x.view(),
                    w: w.view(),
                    target: target.view(),
                    scale: one.view(),
                    lse: lse.view(),
                    g: one.view(),
                    dx: dx.out(),
                    dw: Some(dw.acc()),
                };
                call(&a, |a| dev.linear_xent_bwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
    }
}

fn one(dev: &dyn Kernels, dtype: DType, n: usize) -> ett::error::Result<Tensor> {
    Tensor::from_f64(dev, Role::Input, acc(dtype), &[1.0 / n as f64], [1])
}
