//! Attention against naive loops and finite differences.

use super::*;
use crate::backend::cpu::testing::args::*;

/// Lengths of queries and keys of each sequence, heads, key/value heads, head dimension, whether causal, padding rows.
#[derive(Clone, Copy)]
struct Case(&'static [(usize, usize)], usize, usize, usize, bool, usize);

const CASES: [Case; 5] = [
    Case(&[(1, 1)], 1, 1, 1, true, 0),
    Case(&[(7, 7), (0, 0), (5, 11), (1, 13)], 6, 2, 3, true, 2),
    Case(&[(7, 3), (0, 2), (2, 0)], 2, 2, 5, true, 1),
    Case(&[(3, 17), (131, 131)], 2, 1, 16, true, 0),
    Case(&[(67, 31), (5, 129)], 3, 3, 8, false, 3),
];

impl Case {
    fn cu(&self, of: impl Fn(&(usize, usize)) -> usize) -> Vec<f64> {
        let ends = self.0.iter().scan(0, |at, s| {
            *at += of(s);
            Some(*at as f64)
        });
        std::iter::once(0.0).chain(ends).collect()
    }
    fn rows(&self) -> (usize, usize) {
        let sum = |f: fn(&(usize, usize)) -> usize| self.0.iter().map(f).sum::<usize>() + self.5;
        (sum(|s| s.0), sum(|s| s.1))
    }
    /// q; k and v as columns of one tensor; cu_q; cu_k; dy; y; lse.
    fn args(&self) -> Vec<Arg> {
        let Case(_, h, kv, d, ..) = *self;
        let (n, nk) = self.rows();
        let (cu_q, cu_k) = (self.cu(|s| s.0), self.cu(|s| s.1));
        let mut args = vec![
            act([n, h * d], normal(1, n * h * d)),
            act([nk, 2 * kv * d], normal(2, nk * 2 * kv * d)),
            int([cu_q.len()], cu_q),
            int([cu_k.len()], cu_k),
            act([n, h * d], normal(3, n * h * d)),
        ];
        let values: Vec<_> = args.iter().map(|a| a.2.clone()).collect();
        let mut saved = self.naive(&values);
        let (lse, y) = (saved.remove(1), saved.remove(0));
        args.extend([act([n, h * d], y), acc([n, h], lse)]);
        args
    }
    fn scale(&self) -> f64 {
        (self.3 as f64).powf(-0.5)
    }

    /// y and lse.
    fn fwd(&self, dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
        let Case(seqs, heads, kv_heads, head_dim, causal, _) = *self;
        let n = self.rows().0;
        let (y, lse) = (out(dev, p.act, [n, heads * head_dim]), out(dev, p.acc, [n, heads]));
        let width = kv_heads * head_dim;
        let (k, v) = (t[1].columns(0, width)?, t[1].columns(width, width)?);
        let a = AttentionFwd {
            q: t[0].view(),
            k: k.view(),
            v: v.view(),
            cu_q: t[2].view(),
            cu_k: t[3].view(),
            len_k: None,
            y: y.out(),
            lse: lse.out(),
            heads,
            kv_heads,
            head_dim,
            max_q: seqs.iter().map(|s| s.0).max().unwrap(),
            max_k: seqs.iter().map(|s| s.1).max().unwrap(),
            scale: self.scale(),
            causal,
        };
        dev.attention_fwd(S, &a)?;
        Ok(vec![y, lse])
    }

    /// dq and the fused gradient of k and v.
    fn bwd(&self, dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
        let Case(seqs, heads, kv_heads, head_dim, causal, _) = *self;
        let (n, nk) = self.rows();
        let width = kv_heads * head_dim;
        let (dq, dkv) = (out(dev, p.act, [n, heads * head_dim]), out(dev, p.act, [nk, 2 * width]));
        let (k, v) = (t[1].columns(0, width)?, t[1].columns(width, width)?);
        let (dk, dv) = (dkv.columns(0, width)?, dkv.columns(width, width)?);
        let a = AttentionBwd {
            dy: t[4].view(),
            q: t[0].view(),
            k: k.view(),
            v: v.view(),
            y: t[5].view(),
            lse: t[6].view(),
            cu_q: t[2].view(),
            cu_k: t[3].view(),
            dq: dq.out(),
            dk: dk.out(),
            dv: dv.out(),
            heads,
            kv_heads,
            head_dim,
            max_q: seqs.iter().map(|s| s.0).max().unwrap(),
            max_k: seqs.iter().map(|s| s.1).max().unwrap(),
            scale: self.scale(),
            causal,
        };
        dev.attention_bwd(S, &a)?;
        Ok(vec![dq, dkv])
    }

    fn naive(&self, v: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let Case(seqs, heads, kv, d, causal, _) = *self;
        let n = self.rows().0;
        let (mut y, mut lse) = (vec![0.0; n * heads * d], vec![0.0; n * heads]);
        for (s, &(t, tk)) in seqs.iter().enumerate() {
            let (q0, k0) = (v[2][s] as usize, v[3][s] as usize);
            for (i, h) in (0..t).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                let g = h / (heads / kv);
                let row = (q0 + i) * heads + h;
                let key = |j: usize, c: usize| v[1][(k0 + j) * 2 * kv * d + g * d + c];
                let keys: Vec<usize> = (0..tk).filter(|j| !causal || j + t <= i + tk).collect();
                let score =
                    |j: usize| self.scale() * (0..d).map(|c| v[0][row * d + c] * key(j, c)).sum::<f64>();
                let sum: f64 = keys.iter().map(|&j| score(j).exp()).sum();
                for &j in &keys {
                    for c in 0..d {
                        y[row * d + c] += score(j).exp() / sum * key(j, kv * d + c);
                    }
                }
                lse[row] = if keys.is_empty() { 0.0 } else { sum.ln() };
            }
        }
        vec![y, lse]
    }
}

#[test]
fn forward_matches_a_naive_loop() {
    for case in CASES {
        check(&case.args(), |v| case.naive(v), |dev, p, t| case.fwd(dev, p, t));
    }
}

#[test]
fn backward_matches_in_every_precision() {
    for case in CASES {
        check_self(&case.args(), |dev, p, t| case.bwd(dev, p, t));
    }
}

#[test]
fn backward_matches_finite_differences() {
    for case in &CASES[..3] {
        let loss = |dev: &Cpu, t: &[Tensor]| {
            let v = read(dev, &[case.fwd(dev, Precision::F64, t)?[0].clone(), t[4].clone()]);
            Ok(v[0].iter().zip(&v[1]).map(|(y, dy)| y * dy).sum())
        };
        check_grad(&case.args(), &[0, 1], loss, |dev, t| case.bwd(dev, Precision::F64, t));
    }
}

#[test]
fn slots_of_a_cache_give_the_bits_of_keys_without_gaps() {
    // Slots of 3, 1 and 2 keys at rows 4, 9 and 1 of a cache of 11 rows.
    let case = Case(&[(1, 3), (1, 1), (2, 2)], 2, 1, 4, true, 0);
    let (args, p, dev) = (case.args(), Precision::F32, Cpu::poisoned(2).unwrap());
    let packed = case.fwd(&dev, p, &tensors(&dev, p, &args)).unwrap();
    let mut cache = vec![f64::NAN; 11 * 8];
    for (from, to) in [(0, 4), (1, 5), (2, 6), (3, 9), (4, 1), (5, 2)] {
        cache[to * 8..][..8].copy_from_slice(&args[1].2[from * 8..][..8]);
    }
    let [kv, starts, len] =
        [act([11, 8], cache), int([4], vec![4.0, 9.0, 1.0, -7.0]), int([3], vec![3.0, 1.0, 2.0])]
            .map(|a| tensors(&dev, p, &[a]).remove(0));
    let q = tensors(&dev, p, &args);
    let (y, lse) = (out(&dev, p.act, [4, 8]), out(&dev, p.acc, [4, 2]));
    let (k, v) = (kv.columns(0, 4).unwrap(), kv.columns(4, 4).unwrap());
    let a = AttentionFwd {
        q: q[0].view(),
        k: k.view(),
        v: v.view(),
        cu_q: q[2].view(),
        cu_k: starts.view(),
        len_k: Some(len.view()),
        y: y.out(),
        lse: lse.out(),
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        max_q: 2,
        max_k: 3,
        scale: case.scale(),
        causal: true,
    };
    dev.attention_fwd(S, &a).unwrap();
    assert_eq!(read(&dev, &[y, lse]), read(&dev, &packed));
}

#[test]
fn large_scores_stay_finite() {
    let case = CASES[1];
    let mut args = case.args();
    args[0].2.iter_mut().for_each(|x| *x *= 1e4);
    let dev = Cpu::poisoned(2).unwrap();
    let mut t = tensors(&dev, Precision::F32, &args);
    let saved = case.fwd(&dev, Precision::F32, &t).unwrap();
    t.splice(5.., saved);
    for t in case.bwd(&dev, Precision::F32, &t).unwrap() {
        assert!(t.to_f64(&dev).unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn bad_offsets_are_errors() {
    let case = Case(&[(2, 2), (1, 1)], 1, 1, 2, false, 0);
    let dev = Cpu::poisoned(2).unwrap();
    for (arg, cu) in [(2, [0.0, 2.0, 4.0]), (2, [0.0, 3.0, 2.0]), (3, [1.0, 2.0, 3.0]), (3, [0.0, 0.0, 3.0])]
    {
        let mut args = case.args();
        args[arg].2 = cu.to_vec();
        let t = tensors(&dev, Precision::F32, &args);
        let e = case.fwd(&dev, Precision::F32, &t).unwrap_err().to_string();
        assert!(e.starts_with("attention_fwd: argument `cu_"), "{e}");
    }
}
