use criterion::Criterion;
use ett::backend::{AttentionBwd, AttentionFwd, Cpu, Kernels, Stream};
use ett::ops::Seqs;
use ett::tensor::DType;

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    let dtype = DType::F32;
    let (b, t, heads, kv_heads, head_dim) = (4, 256, 4, 2, 64);
    let n = b * t;
    let seqs = Seqs::new(&dev, &vec![t; b]).expect("memory for a bench");
    let (wq, wk) = (heads * head_dim, kv_heads * head_dim);
    let (q, k, v) =
        (normal(&dev, dtype, [n, wq], 1), normal(&dev, dtype, [n, wk], 2), normal(&dev, dtype, [n, wk], 3));
    let dy = normal(&dev, dtype, [n, wq], 4);
    let (y, lse) = (out(&dev, dtype, [n, wq]), out(&dev, dtype, [n, heads]));
    let (dq, dk, dv) = (out(&dev, dtype, [n, wq]), out(&dev, dtype, [n, wk]), out(&dev, dtype, [n, wk]));
    let name = format!("B {b} T {t} heads {heads}/{kv_heads} of {head_dim}, causal, {dtype}");
    let (cu, max, scale) = (seqs.cu.view(), seqs.max, 1.0 / (head_dim as f64).sqrt());
    let args = AttentionFwd {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        cu_q: cu,
        cu_k: cu,
        y: y.out(),
        lse: lse.out(),
        heads,
        kv_heads,
        head_dim,
        max_q: max,
        max_k: max,
        scale,
        causal: true,
    };
    kernel(c, &name, &args, || dev.attention_fwd(Stream::COMPUTE, &args));
    let args = AttentionBwd {
        dy: dy.view(),
        q: q.view(),
        k: k.view(),
        v: v.view(),
        y: y.view(),
        lse: lse.view(),
        cu_q: cu,
        cu_k: cu,
        dq: dq.out(),
        dk: dk.out(),
        dv: dv.out(),
        heads,
        kv_heads,
        head_dim,
        max_q: max,
        max_k: max,
        scale,
        causal: true,
    };
    kernel(c, &name, &args, || dev.attention_bwd(Stream::COMPUTE, &args));
}
