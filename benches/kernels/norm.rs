use ett::backend::{
    BatchNormBwd, BatchNormFwd, BatchNormMerge, BatchNormMergedBwd, Cpu, DType, GroupNormBwd, GroupNormFwd,
    GroupNormStats, Kernels, LayerNormBwd, LayerNormFwd, RmsNormBwd, RmsNormFwd, Role, Stream,
};
use ett::tensor::Tensor;

use crate::common::{Bench, Check, acc, call, head, normal, out, same};

const S: Stream = Stream::COMPUTE;

/// Rows of a call that are compared with the CPU's.
const CHECKED: usize = 16;

pub fn benches(b: &mut Bench) {
    let shapes: &[[usize; 2]] = if b.gpu { &[[9216, 1536], [65_536, 4096]] } else { &[[4096, 256]] };
    let types: &[DType] = if b.gpu { &[DType::Bf16, DType::F32] } else { &[DType::F32] };
    for &[n, c] in shapes {
        for &dtype in types {
            rms(b, n, c, dtype, false);
            rms(b, n, c, dtype, true);
            layer(b, n, c, dtype);
        }
    }
    group(b);
    batch(b);
    batch_merged(b);
}

fn batch(b: &mut Bench) {
    let ([n, c], dtype) = if b.gpu { ([1 << 20, 128], DType::Bf16) } else { ([8192, 64], DType::F32) };
    let shape = format!("{n}x{c}");
    b.kernel("batch_norm_fwd", &shape, dtype, &|dev, seed| {
        let (x, y) = (normal(dev, dtype, [n, c], seed)?, out(dev, dtype, [n, c])?);
        let (w, bias) = (normal(dev, dtype, [c], 7)?, normal(dev, dtype, [c], 8)?);
        let (mean, var) = (out(dev, acc(dtype), [c])?, out(dev, acc(dtype), [c])?);
        let run = move |dev: &dyn Kernels| {
            let (x, w, b) = (x.view(), w.view(), bias.view());
            let (y, mean, var) = (y.out(), mean.out(), var.out());
            let a = BatchNormFwd { x, w, b, y, mean, var, eps: 1e-5, slope: 0.2 };
            call(&a, |a| dev.batch_norm_fwd(S, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("batch_norm_bwd", &shape, dtype, &|dev, seed| {
        let (x, dy, dx) = (
            normal(dev, dtype, [n, c], seed)?,
            normal(dev, dtype, [n, c], seed + 100)?,
            out(dev, dtype, [n, c])?,
        );
        let (w, bias) = (normal(dev, dtype, [c], 7)?, normal(dev, dtype, [c], 8)?);
        let mean = normal(dev, acc(dtype), [c], 9)?;
        let var = Tensor::from_f64(dev, Role::Input, acc(dtype), &vec![1.0; c], [c])?;
        let (dw, db) = (out(dev, acc(dtype), [c])?, out(dev, acc(dtype), [c])?);
        let run = move |dev: &dyn Kernels| {
            let a = BatchNormBwd {
                dy: dy.view(),
                x: x.view(),
                w: w.view(),
                b: bias.view(),
                mean: mean.view(),
                var: var.view(),
                dx: dx.out(),
                dw: Some(dw.acc()),
                db: Some(db.acc()),
                eps: 1e-5,
                slope: 0.2,
            };
            call(&a, |a| dev.batch_norm_bwd(S, a))
        };
        Ok((Box::new(run), None))
    });
}

fn batch_merged(b: &mut Bench) {
    let ([n, c], dtype) = if b.gpu { ([1 << 20, 128], DType::Bf16) } else { ([8192, 64], DType::F32) };
    let (ranks, wide) = (8, 512);
    b.kernel("batch_norm_merge", &format!("{ranks}x{wide}"), dtype, &|dev, seed| {
        let (means, vars) =
            (normal(dev, acc(dtype), [ranks, wide], seed)?, normal(dev, acc(dtype), [ranks, wide], 7)?);
        let (mean, var) = (out(dev, acc(dtype), [wide])?, out(dev, acc(dtype), [wide])?);
        let run = move |dev: &dyn Kernels| {
            let (means, vars) = (means.view(), vars.view());
            let a = BatchNormMerge { means, vars, mean: mean.out(), var: var.out() };
            call(&a, |a| dev.batch_norm_merge(S, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("batch_norm_merged_bwd", &format!("{n}x{c}"), dtype, &|dev, seed| {
        let (x, dy) = (normal(dev, dtype, [n, c], seed)?, normal(dev, dtype, [n, c], seed + 100)?);
        let (w, bias, dx) =
            (normal(dev, dtype, [c], 7)?, normal(dev, dtype, [c], 8)?, out(dev, dtype, [n, c])?);
        let (mean, sums) = (normal(dev, acc(dtype), [c], 9)?, normal(dev, acc(dtype), [2, c], 10)?);
        let var = Tensor::from_f64(dev, Role::Input, acc(dtype), &vec![1.0; c], [c])?;
        let run = move |dev: &dyn Kernels| {
            let a = BatchNormMergedBwd {
                dy: dy.view(),
                x: x.view(),
                w: w.view(),
                b: bias.view(),
                mean: mean.view(),
                var: var.view(),
                sums: sums.view(),
                dx: dx.out(),
                rows: ranks * n,
                eps: 1e-5,
                slope: 0.2,
            };
            call(&a, |a| dev.batch_norm_merged_bwd(S, a))
        };
        Ok((Box::new(run), None))
    });
}

fn rms(b: &mut Bench, n: usize, c: usize, dtype: DType, residual: bool) {
    let shape = format!("{n}x{c}{}", if residual { " + residual" } else { "" });
    let fwd = move |dev: &dyn Kernels, t: &[Tensor]| {
        let [x, r, w, sum, y, rstd] = t else { unreachable!("six tensors") };
        let a = RmsNormFwd {
            x: x.view(),
            residual: residual.then_some(r.view()),
            w: w.view(),
            sum: residual.then_some(sum.out()),
            y: y.out(),
            rstd: rstd.out(),
            eps: 1e-6,
        };
        call(&a, |a| dev.rms_norm_fwd(S, a))
    };
    b.kernel("rms_norm_fwd", &shape, dtype, &|dev, seed| {
        let x = normal(dev, dtype, [n, c], seed)?;
        let (r, sum) = match residual {
            true => (normal(dev, dtype, [n, c], seed + 100)?, out(dev, dtype, [n, c])?),
            false => (x.clone(), x.clone()),
        };
        let w = normal(dev, dtype, [c], 7)?;
        let t = [x, r, w, sum, out(dev, dtype, [n, c])?, out(dev, acc(dtype), [n])?];
        let copy = t.clone();
        let check: Check = Box::new(move |dev| {
            let cpu = Cpu::new(0).map_err(|e| e.to_string())?;
            let on_cpu = |t: &Tensor| head(dev, &cpu, t, CHECKED, dtype).map_err(|e| e.to_string());
            let [x, r, w, _, y, _] = &copy;
            let part = [
                on_cpu(x)?,
                on_cpu(r)?,
                on_cpu(w)?,
                on_cpu(x)?,
                on_cpu(y)?,
                out(&cpu, acc(dtype), [CHECKED]).map_err(|e| e.to_string())?,
            ];
            fwd(&cpu, &part).map_err(|e| e.to_string())?;
            same("y", dev, y, &cpu, &part[4], dtype)
        });
        Ok((Box::new(move |dev| fwd(dev, &t)), Some(check)))
    });
    let bwd = move |dev: &dyn Kernels, t: &[Tensor]| {
        let [dy, dsum, x, w, rstd, dx, dw] = t else { unreachable!("seven tensors") };
        let a = RmsNormBwd {
            dy: dy.view(),
            dsum: residual.then_some(dsum.view()),
            x: x.view(),
            w: w.view(),
            rstd: rstd.view(),
            dx: dx.out(),
            dw: Some(dw.acc()),
        };
        call(&a, |a| dev.rms_norm_bwd(S, a))
    };
    b.kernel("rms_norm_bwd", &shape, dtype, &|dev, seed| {
        let (dy, x) = (normal(dev, dtype, [n, c], seed)?, normal(dev, dtype, [n, c], seed + 100)?);
        let dsum = if residual { normal(dev, dtype, [n, c], seed + 200)? } else { dy.clone() };
        let (w, rstd) = (normal(dev, dtype, [c], 7)?, normal(dev, acc(dtype), [n], 8)?);
        let t = [dy, dsum, x, w, rstd, out(dev, dtype, [n, c])?, out(dev, acc(dtype), [c])?];
        let copy = t.clone();
        let check: Check = Box::new(move |dev| {
            let cpu = Cpu::new(0).map_err(|e| e.to_string())?;
            let on_cpu = |t: &Tensor| head(dev, &cpu, t, CHECKED, dtype).map_err(|e| e.to_string());
            let [dy, dsum, x, w, rstd, dx, _] = &copy;
            let first = rstd.range(0, CHECKED).and_then(|t| head(dev, &cpu, &t, 1, acc(dtype)));
            let rstd = first.map_err(|e| e.to_string())?;
            let dw = out(&cpu, acc(dtype), [c]).map_err(|e| e.to_string())?;
            let part = [on_cpu(dy)?, on_cpu(dsum)?, on_cpu(x)?, on_cpu(w)?, rstd, on_cpu(dx)?, dw];
            bwd(&cpu, &part).map_err(|e| e.to_string())?;
            same("dx", dev, dx, &cpu, &part[5], dtype)
        });
        Ok((Box::new(move |dev| bwd(dev, &t)), Some(check)))
    });
}

fn layer(b: &mut Bench, n: usize, c: usize, dtype: DType) {
    let shape = format!("{n}x{c}");
    let fwd = move |dev: &dyn Kernels, t: &[Tensor]| {
        let [x, w, b, y, mean, rstd] = t else { unreachable!("six tensors") };
        let a = LayerNormFwd {
            x: x.view(),
            w: w.view(),
            b: b.view(),
            y: y.out(),
            mean: mean.out(),
            rstd: rstd.out(),
            eps: 1e-6,
        };
        call(&a, |a| dev.layer_norm_fwd(S, a))
    };
    b.kernel("layer_norm_fwd", &shape, dtype, &|dev, seed| {
        let stat = || out(dev, acc(dtype), [n]);
        let (w, bias) = (normal(dev, dtype, [c], 7)?, normal(dev, dtype, [c], 8)?);
        let t = [normal(dev, dtype, [n, c], seed)?, w, bias, out(dev, dtype, [n, c])?, stat()?, stat()?];
        let copy = t.clone();
        let check: Check = Box::new(move |dev| {
            let cpu = Cpu::new(0).map_err(|e| e.to_string())?;
            let on_cpu = |t: &Tensor| head(dev, &cpu, t, CHECKED, dtype).map_err(|e| e.to_string());
            let stat = || out(&cpu, acc(dtype), [CHECKED]).map_err(|e| e.to_string());
            let [x, w, b, y, _, _] = &copy;
            let part = [on_cpu(x)?, on_cpu(w)?, on_cpu(b)?, on_cpu(y)?, stat()?, stat()?];
            fwd(&cpu, &part).map_err(|e| e.to_string())?;
            same("y", dev, y, &cpu, &part[3], dtype)
        });
        Ok((Box::new(move |dev| fwd(dev, &t)), Some(check)))
    });
    b.kernel("layer_norm_bwd", &shape, dtype, &|dev, seed| {
        let (dy, x) = (normal(dev, dtype, [n, c], seed)?, normal(dev, dtype, [n, c], seed + 100)?);
        let (w, mean, rstd) =
            (normal(dev, dtype, [c], 7)?, normal(dev, acc(dtype), [n], 8)?, normal(dev, acc(dtype), [n], 9)?);
        let (dx, dw, db) = (out(dev, dtype, [n, c])?, out(dev, acc(dtype), [c])?, out(dev, acc(dtype), [c])?);
        let run = move |dev: &dyn Kernels| {
            let a = LayerNormBwd {
                dy: dy.view(),
                x: x.view(),
                w: w.view(),
                mean: mean.view(),
                rstd: rstd.view(),
                dx: dx.out(),
                dw: Some(dw.acc()),
                db: Some(db.acc()),
            };
            call(&a, |a| dev.layer_norm_bwd(S, a))
        };
        Ok((Box::new(run), None))
    });
}

fn group(b: &mut Bench) {
    let ([n, size, ch, groups], dtype) =
        if b.gpu { ([8, 512, 128, 32], DType::Bf16) } else { ([8, 64, 32, 8], DType::F32) };
    let (dims, shape) = ([n, size, size, ch], format!("{n}x{size}x{size}x{ch} + SiLU"));
    b.kernel("group_norm_fwd", &shape, dtype, &|dev, seed| {
        let (x, y) = (normal(dev, dtype, dims, seed)?, out(dev, dtype, dims)?);
        let (w, bias) = (normal(dev, dtype, [ch], 7)?, normal(dev, dtype, [ch], 8)?);
        let (mean, rstd) = (out(dev, acc(dtype), [n, groups])?, out(dev, acc(dtype), [n, groups])?);
        let run = move |dev: &dyn Kernels| {
            let a = GroupNormFwd {
                x: x.view(),
                w: w.view(),
                b: bias.view(),
                y: y.out(),
                mean: mean.out(),
                rstd: rstd.out(),
                eps: 1e-6,
                silu: true,
            };
            call(&a, |a| dev.group_norm_fwd(S, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("group_norm_stats", &format!("{n}x{size}x{size}x{ch}"), dtype, &|dev, seed| {
        let x = normal(dev, dtype, dims, seed)?;
        let (mean, rstd) = (out(dev, acc(dtype), [n, groups])?, out(dev, acc(dtype), [n, groups])?);
        let run = move |dev: &dyn Kernels| {
            let a = GroupNormStats { x: x.view(), mean: mean.out(), rstd: rstd.out(), eps: 1e-6 };
            call(&a, |a| dev.group_norm_stats(S, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("group_norm_bwd", &shape, dtype, &|dev, seed| {
        let (x, dy, dx) =
            (normal(dev, dtype, dims, seed)?, normal(dev, dtype, dims, seed + 100)?, out(dev, dtype, dims)?);
        let (w, bias) = (normal(dev, dtype, [ch], 7)?, normal(dev, dtype, [ch], 8)?);
        let (mean, rstd) =
            (normal(dev, acc(dtype), [n, groups], 9)?, normal(dev, acc(dtype), [n, groups], 10)?);
        let run = move |dev: &dyn Kernels| {
            let a = GroupNormBwd {
                dy: dy.view(),
                x: x.view(),
                w: w.view(),
                b: bias.view(),
                mean: mean.view(),
                rstd: rstd.view(),
                dx: dx.out(),
                dw: None,
                db: None,
                silu: true,
            };
            call(&a, |a| dev.group_norm_bwd(S, a))
        };
        Ok((Box::new(run), None))
    });
}
