use ett::backend::{Cpu, IbqRows, Kernels, Metric, Nearest, Role, Stream};
use ett::tensor::{DType, Tensor};

use crate::common::{Bench, Check, acc, call, head, normal, out};

pub fn benches(b: &mut Bench) {
    let shapes: &[[usize; 3]] = if b.gpu {
        &[[16_384, 131_072, 256], [4096, 131_072, 256], [1024, 131_072, 256]]
    } else {
        &[[512, 16_384, 64]]
    };
    let types: &[DType] = if b.gpu { &[DType::Bf16, DType::F32] } else { &[DType::F32] };
    for &[m, k, d] in shapes {
        for &dtype in types {
            for (metric, name) in [(Metric::Dot, "dot"), (Metric::L2, "l2")] {
                if dtype == DType::F32 && b.gpu && (m > 4096 || metric == Metric::L2) {
                    continue;
                }
                b.kernel("nearest", &format!("M {m} K {k} D {d} {name}"), dtype, &|dev, seed| {
                    let (z, e) = (normal(dev, dtype, [m, d], seed)?, normal(dev, dtype, [k, d], seed + 100)?);
                    let idx = Tensor::empty(dev, Role::Activation, DType::I32, [m])?;
                    let (cz, ce, ci) = (z.clone(), e.clone(), idx.clone());
                    let check: Check = Box::new(move |dev| {
                        right_codes(dev, &cz, &ce, &ci, metric).map_err(|e| e.to_string())?
                    });
                    let run = move |dev: &dyn Kernels| {
                        let a = Nearest { z: z.view(), e: e.view(), idx: idx.out(), bad: None, metric };
                        call(&a, |a| dev.nearest(Stream::COMPUTE, a))
                    };
                    Ok((Box::new(run), Some(check)))
                });
            }
            b.kernel("ibq_rows", &format!("M {m} K {k} D {d}"), dtype, &|dev, seed| {
                let (z, e) = (normal(dev, dtype, [m, d], seed)?, normal(dev, dtype, [k, d], seed + 100)?);
                let idx = Tensor::empty(dev, Role::Activation, DType::I32, [m])?;
                let stat = || out(dev, acc(dtype), [m]);
                let stats = [stat()?, stat()?, stat()?, stat()?, out(dev, acc(dtype), [1])?];
                let run = move |dev: &dyn Kernels| {
                    let [smax, rest_p, rest_q, xbar, bad] = &stats;
                    let a = IbqRows {
                        z: z.view(),
                        e: e.view(),
                        idx: idx.out(),
                        smax: smax.out(),
                        rest_p: rest_p.out(),
                        rest_q: Some(rest_q.out()),
                        xbar: Some(xbar.out()),
                        bad: bad.acc(),
                        temperature: 0.01,
                    };
                    call(&a, |a| dev.ibq_rows(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
        }
    }
}

/// The first rows' codes score as well as the best that the CPU finds, up to rounding.
fn right_codes(
    dev: &dyn Kernels,
    z: &Tensor,
    e: &Tensor,
    idx: &Tensor,
    metric: Metric,
) -> ett::error::Result<Result<(), String>> {
    let (cpu, rows) = (Cpu::new(0)?, 8.min(z.dims().rows()));
    let codes = e.dims().rows();
    let (z, e) = (head(dev, &cpu, z, rows, DType::F64)?, head(dev, &cpu, e, codes, DType::F64)?);
    let want = Tensor::empty(&cpu, Role::Activation, DType::I32, [rows])?;
    cpu.nearest(Stream::COMPUTE, &Nearest { z: z.view(), e: e.view(), idx: want.out(), bad: None, metric })?;
    let (want, got) = (want.to_host::<i32>(&cpu)?, idx.to_host::<i32>(dev)?);
    let d = z.dims().cols();
    let (z, e) = (z.to_f64(&cpu)?, e.to_f64(&cpu)?);
    let score = |row: usize, code: i32| -> f64 {
        let (z, e) = (&z[row * d..][..d], &e[code as usize * d..][..d]);
        z.iter().zip(e).map(|(a, b)| if metric == Metric::Dot { a * b } else { -(a - b) * (a - b) }).sum()
    };
    Ok((0..rows).try_for_each(|r| {
        let in_range = (0..codes as i32).contains(&got[r]);
        match in_range && score(r, got[r]) >= score(r, want[r]) * (1.0 - 1e-5 * score(r, want[r]).signum()) {
            true => Ok(()),
            false => Err(format!("row {r} has code {}, wanted {}", got[r], want[r])),
        }
    }))
}
