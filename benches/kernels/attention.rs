use ett::backend::{AttentionBwd, AttentionFwd, DType, Kernels, Stream};
use ett::ops::Seqs;

use crate::common::{Bench, acc, call, normal, out};

pub fn benches(b: &mut Bench) {
    let (heads, kv_heads, head_dim) = if b.gpu { (12, 2, 128) } else { (4, 2, 64) };
    let shapes: &[[usize; 2]] = if b.gpu { &[[8, 1152], [4, 4096]] } else { &[[4, 256]] };
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    let (wq, wk) = (heads * head_dim, kv_heads * head_dim);
    let scale = 1.0 / (head_dim as f64).sqrt();
    for &[batch, t] in shapes {
        let n = batch * t;
        let shape = format!("B {batch} T {t} heads {heads}/{kv_heads} of {head_dim}, causal");
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
                    causal: true,
                };
                call(&a, |a| dev.attention_fwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        b.kernel("attention_bwd", &shape, dtype, &|dev, seed| {
            let seqs = Seqs::new(dev, &vec![t; batch])?;
            let (q, k) = (normal(dev, dtype, [n, wq], seed)?, normal(dev, dtype, [n, wk], seed + 100)?);
            let (v, dy) =
                (normal(dev, dtype, [n, wk], seed + 200)?, normal(dev, dtype, [n, wq], seed + 300)?);
            // Values of the size of a forward's output and log-sum-exp, so that probabilities are about [0, 1].
            let (y, lse) = (normal(dev, dtype, [n, wq], seed + 400)?, out(dev, acc(dtype), [n, heads])?);
            dev.fill(Stream::COMPUTE, &ett::backend::Fill { y: lse.out(), value: 8.0 })?;
            let (dq, dk, dv) =
                (out(dev, dtype, [n, wq])?, out(dev, dtype, [n, wk])?, out(dev, dtype, [n, wk])?);
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
                    causal: true,
                };
                call(&a, |a| dev.attention_bwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
    }
}
