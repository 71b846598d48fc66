use ett::backend::{
    Cost, Cpu, DType, IbqBwd, IbqCols, IbqLosses, IbqRows, Kernels, Metric, Nearest, Role, Stream, VqBwd,
    VqLosses,
};
use ett::error::Result;
use ett::tensor::Tensor;

use crate::common::{Bench, Check, acc, call, head, ids, normal, out, scaled};

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
                        let a = Nearest {
                            z: z.view(),
                            e: e.view(),
                            idx: idx.out(),
                            score: None,
                            bad: None,
                            metric,
                        };
                        call(&a, |a| dev.nearest(Stream::COMPUTE, a))
                    };
                    Ok((Box::new(run), Some(check)))
                });
            }
            for kernel in ["ibq_rows", "ibq_cols", "ibq_losses", "ibq_bwd", "ibq"] {
                b.kernel(kernel, &format!("M {m} K {k} D {d}"), dtype, &|dev, seed| {
                    let all = Ibq::new(dev, dtype, [m, k, d], seed)?;
                    // Compute the inputs of the later kernels.
                    all.forward(dev)?;
                    let run = move |dev: &dyn Kernels| match kernel {
                        "ibq_rows" => all.rows(dev),
                        "ibq_cols" => all.cols(dev),
                        "ibq_losses" => all.losses(dev),
                        "ibq_bwd" => all.bwd(dev),
                        _ => {
                            let forward = all.forward(dev)?;
                            let backward = all.bwd(dev)?;
                            Ok(Cost {
                                flop: forward.flop + backward.flop,
                                bytes: forward.bytes + backward.bytes,
                            })
                        }
                    };
                    Ok((Box::new(run), None))
                });
            }
            b.kernel("vq_losses", &format!("M {m} K {k} D {d}"), dtype, &|dev, seed| {
                let all = Ibq::new(dev, dtype, [m, k, d], seed)?;
                let run = move |dev: &dyn Kernels| {
                    let a = VqLosses {
                        z: all.z.view(),
                        e: all.e.view(),
                        idx: all.idx.view(),
                        inv_count: all.inv_count.view(),
                        zq: all.zq.out(),
                        quant: all.quant.out(),
                        beta_commit: 0.25,
                        beta_code: 1.0,
                    };
                    call(&a, |a| dev.vq_losses(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
            b.kernel("vq_bwd", &format!("M {m} K {k} D {d}"), dtype, &|dev, seed| {
                let all = Ibq::new(dev, dtype, [m, k, d], seed)?;
                let run = move |dev: &dyn Kernels| {
                    let a = VqBwd {
                        z: all.z.view(),
                        e: all.e.view(),
                        idx: all.idx.view(),
                        inv_count: all.inv_count.view(),
                        g: all.g.view(),
                        g_quant: all.weight.view(),
                        dz: all.dz.out(),
                        de: Some(all.de.acc()),
                        beta_commit: 0.25,
                        beta_code: 1.0,
                    };
                    call(&a, |a| dev.vq_bwd(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
        }
    }
}

/// Temperature of the entropies.
const TEMPERATURE: f64 = 0.01;

/// The tensors of a quantizer, forward and backward.
struct Ibq {
    z: Tensor,
    e: Tensor,
    g: Tensor,
    idx: Tensor,
    smax: Tensor,
    rest_p: Tensor,
    rest_q: Tensor,
    xbar: Tensor,
    bad: Tensor,
    col: Tensor,
    c: Tensor,
    inv_count: Tensor,
    zq: Tensor,
    quant: Tensor,
    sample: Tensor,
    avg: Tensor,
    weight: Tensor,
    dz: Tensor,
    de: Tensor,
}

impl Ibq {
    /// Scores with a spread of 1, so that no code stands out and no tile can be skipped.
    fn new(dev: &dyn Kernels, dtype: DType, [m, k, d]: [usize; 3], seed: u64) -> Result<Self> {
        let sum = acc(dtype);
        let (row, code, one) = (|| out(dev, sum, [m]), || out(dev, sum, [k]), || out(dev, sum, [1]));
        let number = |v: f64| Tensor::from_f64(dev, Role::Input, sum, &[v], [1]);
        Ok(Ibq {
            z: normal(dev, dtype, [m, d], seed)?,
            e: scaled(dev, dtype, [k, d], seed + 100, (d as f64).powf(-0.5))?,
            g: normal(dev, dtype, [m, d], seed + 200)?,
            idx: ids(dev, m, k, seed)?,
            smax: row()?,
            rest_p: row()?,
            rest_q: row()?,
            xbar: row()?,
            bad: one()?,
            col: code()?,
            c: code()?,
            inv_count: number(1.0 / m as f64)?,
            zq: out(dev, dtype, [m, d])?,
            quant: one()?,
            sample: one()?,
            avg: one()?,
            weight: number(0.1)?,
            dz: out(dev, dtype, [m, d])?,
            de: out(dev, sum, [k, d])?,
        })
    }

    fn rows(&self, dev: &dyn Kernels) -> Result<Cost> {
        let a = IbqRows {
            z: self.z.view(),
            e: self.e.view(),
            idx: self.idx.out(),
            smax: self.smax.out(),
            rest_p: self.rest_p.out(),
            rest_q: Some(self.rest_q.out()),
            xbar: Some(self.xbar.out()),
            bad: self.bad.acc(),
            temperature: TEMPERATURE,
        };
        call(&a, |a| dev.ibq_rows(Stream::COMPUTE, a))
    }

    fn cols(&self, dev: &dyn Kernels) -> Result<Cost> {
        let a = IbqCols {
            z: self.z.view(),
            e: self.e.view(),
            idx: self.idx.view(),
            smax: self.smax.view(),
            rest_q: self.rest_q.view(),
            col: self.col.out(),
            temperature: TEMPERATURE,
        };
        call(&a, |a| dev.ibq_cols(Stream::COMPUTE, a))
    }

    fn losses(&self, dev: &dyn Kernels) -> Result<Cost> {
        let a = IbqLosses {
            z: self.z.view(),
            e: self.e.view(),
            idx: self.idx.view(),
            rest_q: Some(self.rest_q.view()),
            xbar: Some(self.xbar.view()),
            col: Some(self.col.view()),
            inv_count: self.inv_count.view(),
            zq: self.zq.out(),
            c: Some(self.c.out()),
            quant: self.quant.out(),
            sample: Some(self.sample.out()),
            avg: Some(self.avg.out()),
            eps: 1e-5,
            beta_commit: 1.0,
            beta_code: 0.25,
        };
        call(&a, |a| dev.ibq_losses(Stream::COMPUTE, a))
    }

    fn forward(&self, dev: &dyn Kernels) -> Result<Cost> {
        let parts = [self.rows(dev)?, self.cols(dev)?, self.losses(dev)?];
        Ok(Cost { flop: parts.iter().map(|c| c.flop).sum(), bytes: parts.iter().map(|c| c.bytes).sum() })
    }

    fn bwd(&self, dev: &dyn Kernels) -> Result<Cost> {
        let a = IbqBwd {
            z: self.z.view(),
            e: self.e.view(),
            idx: self.idx.view(),
            smax: self.smax.view(),
            rest_p: self.rest_p.view(),
            rest_q: Some(self.rest_q.view()),
            xbar: Some(self.xbar.view()),
            c: Some(self.c.view()),
            inv_count: self.inv_count.view(),
            g: self.g.view(),
            g_quant: self.weight.view(),
            g_sample: Some(self.weight.view()),
            g_avg: Some(self.weight.view()),
            dz: self.dz.out(),
            de: Some(self.de.acc()),
            temperature: TEMPERATURE,
            beta_commit: 1.0,
            beta_code: 0.25,
        };
        call(&a, |a| dev.ibq_bwd(Stream::COMPUTE, a))
    }
}

/// Checks that the codes of the first rows score as well as the CPU's best codes, up to rounding.
fn right_codes(
    dev: &dyn Kernels,
    z: &Tensor,
    e: &Tensor,
    idx: &Tensor,
    metric: Metric,
) -> Result<std::result::Result<(), String>> {
    let (cpu, rows) = (Cpu::new(0)?, 8.min(z.dims().rows()));
    let codes = e.dims().rows();
    let (z, e) = (head(dev, &cpu, z, rows, DType::F64)?, head(dev, &cpu, e, codes, DType::F64)?);
    let want = Tensor::empty(&cpu, Role::Activation, DType::I32, [rows])?;
    cpu.nearest(
        Stream::COMPUTE,
        &Nearest { z: z.view(), e: e.view(), idx: want.out(), score: None, bad: None, metric },
    )?;
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
