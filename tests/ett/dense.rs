//! The IBQ quantizer as the paper defines it, dense and in f64: every matrix of tokens x codes is stored, and nothing
//! is rearranged to avoid cancellation. Written from the formulas, not from the kernels.

use std::sync::Arc;

use ett::autograd::Tape;
use ett::backend::{DType, Kernels, Precision, Role};
use ett::ops::{self, Entropy, IbqOptions};
use ett::tensor::Tensor;

use crate::common::{normal, rounded, tensor};

/// Inputs of a quantizer, and the gradients of its outputs.
#[derive(Clone)]
pub struct Problem {
    pub m: usize,
    pub k: usize,
    pub d: usize,
    /// `[M, D]`.
    pub z: Vec<f64>,
    /// `[K, D]`.
    pub e: Vec<f64>,
    /// `[M, D]`: the gradient of `zq`.
    pub g: Vec<f64>,
    pub temperature: f64,
    pub eps: f64,
    pub beta_commit: f64,
    pub beta_code: f64,
    /// The gradients of the losses: quant, sample, avg.
    pub w: [f64; 3],
}

impl Problem {
    /// Normal tokens and gradients; `spread` is the standard deviation of the scores.
    pub fn new(m: usize, k: usize, d: usize, spread: f64, seed: u64) -> Self {
        let scale = spread.sqrt() / (d as f64).powf(0.25);
        let scaled = |n: usize, s: u64| normal(3 * seed + s, n).iter().map(|v| v * scale).collect::<Vec<_>>();
        Problem {
            m,
            k,
            d,
            z: scaled(m * d, 0),
            e: scaled(k * d, 1),
            g: normal(3 * seed + 2, m * d),
            temperature: 0.4,
            eps: 1e-5,
            beta_commit: 1.0,
            beta_code: 0.25,
            w: [0.7, 0.3, -0.4],
        }
    }

    /// The same with the inputs rounded to this precision.
    pub fn rounded(mut self, prec: Precision) -> Self {
        for v in [&mut self.z, &mut self.e, &mut self.g] {
            *v = rounded(prec.act, v);
        }
        self
    }

    fn options(&self) -> IbqOptions {
        IbqOptions {
            entropy: Some(Entropy { temperature: self.temperature, eps: self.eps }),
            beta_commit: self.beta_commit,
            beta_code: self.beta_code,
        }
    }

    /// `S = z E^T`, `[M, K]`.
    pub fn scores(&self) -> Vec<f64> {
        times_transposed(&self.z, &self.e, self.d)
    }
}

/// Results of a quantizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub idx: Vec<i32>,
    pub smax: Vec<f64>,
    pub rest_p: Vec<f64>,
    pub rest_q: Vec<f64>,
    pub xbar: Vec<f64>,
    pub zq: Vec<f64>,
    /// quant, sample, avg.
    pub losses: [f64; 3],
    pub dz: Vec<f64>,
    pub de: Vec<f64>,
    /// Tokens without a finite score; set by the kernels only.
    pub bad: f64,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// `a b^T` for rows of `d` values.
fn times_transposed(a: &[f64], b: &[f64], d: usize) -> Vec<f64> {
    a.chunks(d).flat_map(|x| b.chunks(d).map(move |y| dot(x, y))).collect()
}

fn softmax(row: &[f64], temperature: f64) -> (Vec<f64>, Vec<f64>) {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let x: Vec<f64> = row.iter().map(|s| (s - max) / temperature).collect();
    let lse = x.iter().map(|v| v.exp()).sum::<f64>().ln();
    let log: Vec<f64> = x.iter().map(|v| v - lse).collect();
    (log.iter().map(|v| v.exp()).collect(), log)
}

/// The closed form.
pub fn dense(p: &Problem) -> Answer {
    let (m, k, d, t) = (p.m, p.k, p.d, p.temperature);
    let md = (m * d) as f64;
    let s = p.scores();
    let idx: Vec<usize> =
        s.chunks(k).map(|row| (0..k).fold(0, |best, j| if row[j] > row[best] { j } else { best })).collect();
    let zq: Vec<f64> = idx.iter().flat_map(|&j| p.e[j * d..(j + 1) * d].to_vec()).collect();
    let square: f64 = zq.iter().zip(&p.z).map(|(e, z)| (e - z) * (e - z)).sum();

    let soft: Vec<(Vec<f64>, Vec<f64>)> = s.chunks(k).map(|row| softmax(row, t)).collect();
    let entropy: Vec<f64> = soft.iter().map(|(q, log)| -dot(q, log)).collect();
    let a: Vec<f64> = (0..k).map(|j| soft.iter().map(|(q, _)| q[j]).sum::<f64>() / m as f64).collect();
    let c: Vec<f64> = a.iter().map(|a| -((a + p.eps).ln() + a / (a + p.eps))).collect();
    let losses = [
        (1.0 + p.beta_commit + p.beta_code) * square / md,
        entropy.iter().sum::<f64>() / m as f64,
        -a.iter().map(|a| a * (a + p.eps).ln()).sum::<f64>(),
    ];

    let [w_quant, w_sample, w_avg] = p.w;
    let g: Vec<f64> = (0..m * d).map(|i| p.g[i] + w_quant * 2.0 * (zq[i] - p.z[i]) / md).collect();
    let dp = times_transposed(&g, &p.e, d);
    let (mut dz, mut de) = (vec![0.0; m * d], vec![0.0; k * d]);
    for i in 0..m {
        let row = i * k..(i + 1) * k;
        let (prob, _) = softmax(&s[row.clone()], 1.0);
        let dp = &dp[row];
        let delta = dot(&prob, dp);
        let (q, log) = &soft[i];
        let r = dot(q, &c);
        for j in 0..k {
            let ds = prob[j] * (dp[j] - delta)
                + q[j] * (-w_sample * (log[j] + entropy[i]) + w_avg * (c[j] - r)) / (m as f64 * t);
            for x in 0..d {
                dz[i * d + x] += ds * p.e[j * d + x];
                de[j * d + x] += ds * p.z[i * d + x];
            }
        }
        for x in 0..d {
            let apart = p.z[i * d + x] - zq[i * d + x];
            dz[i * d + x] += w_quant * 2.0 * (1.0 + p.beta_commit) * apart / md;
            de[idx[i] * d + x] += g[i * d + x] - w_quant * 2.0 * p.beta_code * apart / md;
        }
    }
    let rest = |t: f64, f: fn(f64) -> f64| -> Vec<f64> {
        let sum = |(row, &best): (&[f64], &usize)| {
            (0..k).filter(|&j| j != best).map(|j| f((row[j] - row[best]) / t)).sum()
        };
        s.chunks(k).zip(&idx).map(sum).collect()
    };
    let rest_q = rest(t, f64::exp);
    let weighted = rest(t, |x| x * x.exp());
    Answer {
        smax: s.chunks(k).zip(&idx).map(|(row, &j)| row[j]).collect(),
        rest_p: rest(1.0, f64::exp),
        xbar: weighted.iter().zip(&rest_q).map(|(w, r)| w / (1.0 + r)).collect(),
        rest_q,
        idx: idx.into_iter().map(|j| j as i32).collect(),
        zq,
        losses,
        dz,
        de,
        bad: 0.0,
    }
}

/// The same by the op. `de` starts from zero in the accumulator type, like the gradient of a trained codebook.
pub fn kernels(dev: &Arc<dyn Kernels>, prec: Precision, p: &Problem) -> ett::error::Result<Answer> {
    kernels_on(dev, prec, prec.act, p)
}

/// The same with tokens and codes of type `operands`; what zq receives is an activation.
pub fn kernels_on(
    dev: &Arc<dyn Kernels>,
    prec: Precision,
    operands: DType,
    p: &Problem,
) -> ett::error::Result<Answer> {
    let dev_ref = &**dev;
    let t = Tape::new(dev.clone(), prec);
    let z = t.leaf(tensor(dev_ref, operands, &p.z, [p.m, p.d]));
    let de = Tensor::zeros(dev_ref, Role::Gradient, prec.acc, [p.k, p.d])?;
    let e = t.weight(tensor(dev_ref, operands, &p.e, [p.k, p.d]), Some(de.clone()));
    let read = |t: &Tensor| t.to_f64(dev_ref);
    let one = |v: f64| tensor(dev_ref, prec.acc, &[v], [1]);
    let q = ops::ibq(&t, &z, &e, &one(1.0 / p.m as f64), p.options())?;
    let (Some(sample), Some(avg), Some(rows)) = (&q.sample, &q.avg, &q.rows) else {
        panic!("ibq returns entropies and row statistics");
    };
    let entropy = rows.entropy.as_ref().expect("statistics of the entropies");
    let g = tensor(dev_ref, prec.act, &p.g, [p.m, p.d]);
    let w = p.w.map(one);
    let mut answer = Answer {
        idx: q.idx.to_host(dev_ref)?,
        smax: read(&rows.smax)?,
        rest_p: read(&rows.rest_p)?,
        rest_q: read(&entropy.rest_q)?,
        xbar: read(&entropy.xbar)?,
        zq: read(q.zq.value())?,
        losses: [read(q.quant.value())?[0], read(sample.value())?[0], read(avg.value())?[0]],
        dz: Vec::new(),
        de: Vec::new(),
        bad: read(&q.bad)?[0],
    };
    let read_by_others = ops::cast(&t, &q.zq, prec.act)?;
    let seeds = [(&read_by_others, &g), (&q.quant, &w[0]), (sample, &w[1]), (avg, &w[2])];
    // A loss of weight 0 is not seeded at all.
    let seeds: Vec<_> =
        seeds.into_iter().enumerate().filter(|(i, _)| *i == 0 || p.w[i - 1] != 0.0).map(|(_, s)| s).collect();
    let mut grads = t.backward(&seeds)?;
    answer.dz = read(&grads.take(&z)?.expect("tokens receive a gradient"))?;
    answer.de = read(&de)?;
    Ok(answer)
}
