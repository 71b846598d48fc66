use ett::backend::{
    DType, HingeBwd, HingeFwd, Kernels, L1Bwd, L1Fwd, LinearXentBwd, LinearXentFwd, LpipsBwd, LpipsFwd, Role,
    Sample, Stream, XentBwd, XentFwd,
};
use ett::tensor::Tensor;

use crate::common::{Bench, acc, call, ids, normal, out, scaled};

pub fn benches(b: &mut Bench) {
    let shapes: &[[usize; 3]] =
        if b.gpu { &[[1024, 1536, 151_936], [8192, 1536, 131_072]] } else { &[[256, 256, 16_384]] };
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    pixels(b);
    logits(b);
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

/// Losses over pictures, features and patch logits, forward and backward.
fn pixels(b: &mut Bench) {
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    let n = if b.gpu { 64 << 20 } else { 1 << 20 };
    b.kernel("l1_fwd", &n.to_string(), dtype, &|dev, seed| {
        let (x, y) = (normal(dev, dtype, [n], seed)?, normal(dev, dtype, [n], seed + 100)?);
        let (scale, loss) = (one(dev, dtype, n)?, out(dev, acc(dtype), [1])?);
        let run = move |dev: &dyn Kernels| {
            let a = L1Fwd { a: x.view(), b: y.view(), scale: scale.view(), loss: loss.acc() };
            call(&a, |a| dev.l1_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("l1_bwd", &n.to_string(), dtype, &|dev, seed| {
        let (x, y) = (normal(dev, dtype, [n], seed)?, normal(dev, dtype, [n], seed + 100)?);
        let (scale, da) = (one(dev, dtype, n)?, out(dev, dtype, [n])?);
        let run = move |dev: &dyn Kernels| {
            let (a, b, scale) = (x.view(), y.view(), scale.view());
            call(&L1Bwd { a, b, scale, g: scale, da: da.out() }, |a| dev.l1_bwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("hinge_fwd", &n.to_string(), dtype, &|dev, seed| {
        let (x, scale, loss) =
            (normal(dev, dtype, [n], seed)?, one(dev, dtype, n)?, out(dev, acc(dtype), [1])?);
        let run = move |dev: &dyn Kernels| {
            let a = HingeFwd { x: x.view(), scale: scale.view(), loss: loss.acc(), real: true, factor: 0.5 };
            call(&a, |a| dev.hinge_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("hinge_bwd", &n.to_string(), dtype, &|dev, seed| {
        let (x, scale, dx) = (normal(dev, dtype, [n], seed)?, one(dev, dtype, n)?, out(dev, dtype, [n])?);
        let run = move |dev: &dyn Kernels| {
            let (x, scale) = (x.view(), scale.view());
            let a = HingeBwd { x, scale, g: scale, dx: dx.out(), real: true, factor: 0.5 };
            call(&a, |a| dev.hinge_bwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    let shapes: &[[usize; 2]] = if b.gpu { &[[1 << 20, 64], [1 << 17, 512]] } else { &[[4096, 64]] };
    for &[p, c] in shapes {
        let shape = format!("{p}x{c}");
        b.kernel("lpips_fwd", &shape, dtype, &|dev, seed| {
            let (f0, f1) = (normal(dev, dtype, [p, c], seed)?, normal(dev, dtype, [p, c], seed + 100)?);
            let (w, scale, loss) =
                (normal(dev, dtype, [c], 7)?, one(dev, dtype, p)?, out(dev, acc(dtype), [1])?);
            let run = move |dev: &dyn Kernels| {
                let (f0, f1, w, scale) = (f0.view(), f1.view(), w.view(), scale.view());
                let a = LpipsFwd { f0, f1, w, scale, loss: loss.acc(), eps: 1e-10, factor: 1.0 };
                call(&a, |a| dev.lpips_fwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        b.kernel("lpips_bwd", &shape, dtype, &|dev, seed| {
            let (f0, f1) = (normal(dev, dtype, [p, c], seed)?, normal(dev, dtype, [p, c], seed + 100)?);
            let (w, scale, df1) =
                (normal(dev, dtype, [c], 7)?, one(dev, dtype, p)?, out(dev, dtype, [p, c])?);
            let run = move |dev: &dyn Kernels| {
                let (f0, f1, w, scale) = (f0.view(), f1.view(), w.view(), scale.view());
                let a = LpipsBwd { f0, f1, w, scale, g: scale, df1: df1.out(), eps: 1e-10, factor: 1.0 };
                call(&a, |a| dev.lpips_bwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
    }
}

/// Cross-entropy on stored logits, and sampling from them.
fn logits(b: &mut Bench) {
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    let [n, v] = if b.gpu { [2048, 151_936] } else { [64, 8192] };
    let shape = format!("N {n} V {v}");
    b.kernel("xent_fwd", &shape, dtype, &|dev, seed| {
        let (x, target, scale) =
            (normal(dev, dtype, [n, v], seed)?, ids(dev, n, v, seed)?, one(dev, dtype, n)?);
        let (lse, loss) = (out(dev, acc(dtype), [n])?, out(dev, acc(dtype), [1])?);
        let run = move |dev: &dyn Kernels| {
            let (logits, target, scale) = (x.view(), target.view(), scale.view());
            let a = XentFwd { logits, target, weight: None, scale, lse: lse.out(), loss: loss.acc() };
            call(&a, |a| dev.xent_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("xent_bwd", &shape, dtype, &|dev, seed| {
        let (x, target, scale) =
            (normal(dev, dtype, [n, v], seed)?, ids(dev, n, v, seed)?, one(dev, dtype, n)?);
        let (lse, d) = (normal(dev, acc(dtype), [n], 8)?, out(dev, dtype, [n, v])?);
        let run = move |dev: &dyn Kernels| {
            let (logits, target, scale, lse) = (x.view(), target.view(), scale.view(), lse.view());
            let a = XentBwd { logits, target, weight: None, scale, lse, g: scale, dlogits: d.out() };
            call(&a, |a| dev.xent_bwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    let rows = 16;
    for (what, top_k, top_p) in [("all", 0, 1.0), ("top-k and top-p", 2048, 0.9)] {
        b.kernel("sample", &format!("B {rows} V {v}, {what}"), dtype, &|dev, seed| {
            let (x, u) = (normal(dev, dtype, [rows, v], seed)?, normal(dev, dtype, [rows, v], seed + 100)?);
            let (number, position) = (ids(dev, rows, rows, seed)?, ids(dev, rows, rows, seed)?);
            let idx = ids(dev, rows, rows, seed)?;
            let run = move |dev: &dyn Kernels| {
                let a = Sample {
                    logits: x.view(),
                    without: Some(u.view()),
                    number: number.view(),
                    position: position.acc(),
                    idx: idx.out(),
                    temperature: 1.0,
                    top_k,
                    top_p,
                    guidance: 3.0,
                    seed: 1,
                };
                call(&a, |a| dev.sample(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
    }
}

fn one(dev: &dyn Kernels, dtype: DType, n: usize) -> ett::error::Result<Tensor> {
    Tensor::from_f64(dev, Role::Input, acc(dtype), &[1.0 / n as f64], [1])
}
