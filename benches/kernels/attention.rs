use ett::backend::{AttentionBwd, AttentionFwd, DType, Kernels, Stream};
use ett::ops::{Seqs, Slots};

use crate::common::{Bench, acc, call, normal, out};

/// B sequences of T queries and keys.
struct Shape {
    batch: usize,
    t: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    causal: bool,
}

pub fn benches(b: &mut Bench) {
    let of =
        |batch, t, heads, kv_heads, head_dim, causal| Shape { batch, t, heads, kv_heads, head_dim, causal };
    let shapes = match b.gpu {
        // The language model's heads, larger ones, and the tokenizer's.
        true => vec![
            of(8, 1152, 12, 2, 128, true),
            of(4, 4096, 12, 2, 128, true),
            of(16, 1024, 4, 2, 256, true),
            of(16, 1024, 1, 1, 512, false),
        ],
        false => vec![of(4, 256, 4, 2, 64, true)],
    };
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    shapes.iter().for_each(|shape| whole(b, shape, dtype));
    // Slots, keys in each, and queries of each.
    let decodes: &[[usize; 3]] =
        if b.gpu { &[[32, 4096, 1], [32, 1152, 1], [1, 4096, 1]] } else { &[[4, 128, 1]] };
    decodes.iter().for_each(|&decode| decoding(b, decode, dtype));
}

fn whole(b: &mut Bench, shape: &Shape, dtype: DType) {
    let &Shape { batch, t, heads, kv_heads, head_dim, causal } = shape;
    let (wq, wk) = (heads * head_dim, kv_heads * head_dim);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let n = batch * t;
    let mask = if causal { ", causal" } else { "" };
    let shape = format!("B {batch} T {t} heads {heads}/{kv_heads} of {head_dim}{mask}");
    b.kernel("attention_fwd", &shape, dtype, &|dev, seed| {
        let seqs = Seqs::new(dev, &vec![t; batch])?;
        let (q, k) = (normal(dev, dtype, [n, wq], seed)?, normal(dev, dtype, [n, wk], seed + 100)?);
        let v = normal(dev, dtype, [n, wk], seed + 200)?;
        let (y, lse) = (out(dev, dtype, [n, wq])?, out(dev, acc(dtype), [n, heads])?);
        let run = move |dev: &dyn Kernels| {
            let a = AttentionFwd {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                cu_q: seqs.cu.view(),
                cu_k: seqs.cu.view(),
                len_k: None,
                y: y.out(),
                lse: lse.out(),
                heads,
                kv_heads,
                head_dim,
                max_q: t,
                max_k: t,
                scale,
                causal,
            };
            call(&a, |a| dev.attention_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("attention_bwd", &shape, dtype, &|dev, seed| {
        let seqs = Seqs::new(dev, &vec![t; batch])?;
        let (q, k) = (normal(dev, dtype, [n, wq], seed)?, normal(dev, dtype, [n, wk], seed + 100)?);
        let (v, dy) = (normal(dev, dtype, [n, wk], seed + 200)?, normal(dev, dtype, [n, wq], seed + 300)?);
        // Values of the size of a forward's output and log-sum-exp, so that probabilities are about [0, 1].
        let (y, lse) = (normal(dev, dtype, [n, wq], seed + 400)?, out(dev, acc(dtype), [n, heads])?);
        dev.fill(Stream::COMPUTE, &ett::backend::Fill { y: lse.out(), value: 8.0 })?;
        let (dq, dk, dv) = (out(dev, dtype, [n, wq])?, out(dev, dtype, [n, wk])?, out(dev, dtype, [n, wk])?);
        let run = move |dev: &dyn Kernels| {
            let a = AttentionBwd {
                dy: dy.view(),
                q: q.view(),
                k: k.view(),
                v: v.view(),
                y: y.view(),
                lse: lse.view(),
                cu_q: seqs.cu.view(),
                cu_k: seqs.cu.view(),
                dq: dq.out(),
                dk: dk.out(),
                dv: dv.out(),
                heads,
                kv_heads,
                head_dim,
                max_q: t,
                max_k: t,
                scale,
                causal,
            };
            call(&a, |a| dev.attention_bwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
}

/// A step of decoding: the keys and values of a full cache are read once.
fn decoding(b: &mut Bench, [slots, len, queries]: [usize; 3], dtype: DType) {
    let (heads, kv_heads, head_dim) = if b.gpu { (12, 2, 128) } else { (4, 2, 64) };
    let (n, wq, wk) = (slots * queries, heads * head_dim, kv_heads * head_dim);
    let shape = format!("S {slots} T {queries} Tk {len} heads {heads}/{kv_heads} of {head_dim}, cached");
    b.kernel("attention_fwd", &shape, dtype, &|dev, seed| {
        let seqs = Seqs::new(dev, &vec![queries; slots])?;
        let places = Slots::new(dev, &vec![len; slots], len)?;
        let q = normal(dev, dtype, [n, wq], seed)?;
        let cache = normal(dev, dtype, [slots * len, 2 * wk], seed + 100)?;
        let (k, v) = (cache.columns(0, wk)?, cache.columns(wk, wk)?);
        let (y, lse) = (out(dev, dtype, [n, wq])?, out(dev, acc(dtype), [n, heads])?);
        let run = move |dev: &dyn Kernels| {
            let a = AttentionFwd {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                cu_q: seqs.cu.view(),
                cu_k: places.start.view(),
                len_k: Some(places.len.view()),
                y: y.out(),
                lse: lse.out(),
                heads,
                kv_heads,
                head_dim,
                max_q: queries,
                max_k: len,
                scale: 1.0 / (head_dim as f64).sqrt(),
                causal: true,
            };
            call(&a, |a| dev.attention_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
}
