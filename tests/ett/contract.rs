//! What kernels and tensors say of arguments that the contract forbids: one sentence that names the argument.

use ett::backend::{
    Add, AttentionFwd, Cast, Conv2dFwd, GatherFwd, GroupNormFwd, IbqRows, Kernels, LinearXentFwd, Matmul,
    MatmulAcc, RmsNormFwd, Role, Rope, Stream, SwigluFwd, UnaryFwd,
};
use ett::backend::{KERNELS, Unary};
use ett::error::{Error, Result};
use ett::tensor::{DType, Dims, Tensor};

use crate::common::{Outcome, cpu, int, tensor};

const S: Stream = Stream::COMPUTE;

/// Expects the error of `op` about one of `args`.
fn refuses(result: Result<()>, op: &str, args: &[&str]) {
    match result {
        Err(e @ Error::Argument { op: o, arg, .. }) => {
            assert!(o == op && args.contains(&arg), "wanted {op}: {args:?}, got: {e}");
            let text = e.to_string();
            assert!(
                text.starts_with(&format!("{op}: argument `{arg}` is ")) && text.contains(", wanted "),
                "{text}"
            );
            assert!(!text.contains('\n'), "{text}");
        }
        Err(e) => panic!("{op}: wanted an argument error, got: {e}"),
        Ok(()) => panic!("{op}: a wrong {args:?} was accepted"),
    }
}

struct Maker(std::sync::Arc<dyn Kernels>);

impl Maker {
    fn f32(&self, dims: impl Into<Dims>) -> Tensor {
        let dims = dims.into();
        tensor(&*self.0, DType::F32, &vec![0.5; dims.numel()], dims)
    }
    fn of(&self, dtype: DType, dims: impl Into<Dims>) -> Tensor {
        let dims = dims.into();
        tensor(&*self.0, dtype, &vec![0.5; dims.numel()], dims)
    }
}

#[test]
fn products_name_what_does_not_fit() {
    let dev = cpu(1);
    let m = Maker(dev.clone());
    let (a, b, y) = (m.f32([3, 4]), m.f32([5, 4]), m.f32([3, 5]));
    let run = |a: &Tensor, b: &Tensor, bias: Option<&Tensor>, y: &Tensor| {
        let bias = bias.map(Tensor::view);
        dev.matmul(S, &Matmul { a: a.view(), b: b.view(), ta: false, tb: true, bias, y: y.out() })
    };
    run(&a, &b, Some(&m.f32([5])), &y).expect("the right arguments are accepted");
    refuses(run(&a, &m.f32([5, 3]), None, &y), "matmul", &["a", "b"]);
    refuses(run(&a, &b, None, &m.f32([3, 4])), "matmul", &["y"]);
    refuses(run(&a, &b, None, &m.f32([2, 5])), "matmul", &["y"]);
    refuses(run(&a, &b, Some(&m.f32([4])), &y), "matmul", &["bias"]);
    refuses(run(&a, &m.of(DType::F64, [5, 4]), None, &y), "matmul", &["a", "b"]);
    refuses(run(&a, &b, None, &m.of(DType::Bf16, [3, 5])), "matmul", &["y", "a"]);
    let acc = |y: &Tensor| {
        dev.matmul_acc(
            S,
            &MatmulAcc { a: a.view(), b: y.view(), ta: true, tb: false, y: m.f32([4, 5]).acc() },
        )
    };
    acc(&y).expect("the right arguments are accepted");
    refuses(acc(&m.f32([4, 5])), "matmul_acc", &["a", "b"]);
}

#[test]
fn convolutions_and_norms_name_what_does_not_fit() {
    let dev = cpu(1);
    let m = Maker(dev.clone());
    let x = m.f32([1, 4, 4, 6]);
    let conv = |w: [usize; 4], y: [usize; 4]| {
        let (w, y) = (m.f32(w), m.f32(y));
        let a = Conv2dFwd {
            x: x.view(),
            w: w.view(),
            bias: None,
            y: y.out(),
            stride: 1,
            pad_top: 1,
            pad_left: 1,
        };
        dev.conv2d_fwd(S, &a)
    };
    conv([2, 3, 3, 6], [1, 4, 4, 2]).expect("the right arguments are accepted");
    refuses(conv([2, 3, 3, 5], [1, 4, 4, 2]), "conv2d_fwd", &["w", "x"]);
    refuses(conv([2, 3, 3, 6], [1, 4, 4, 3]), "conv2d_fwd", &["y", "w"]);
    refuses(conv([2, 3, 3, 6], [2, 4, 4, 2]), "conv2d_fwd", &["y"]);
    let norm = |c: usize, groups: usize| {
        let (w, y, s) = (m.f32([c]), m.f32([1, 4, 4, 6]), m.f32([1, groups]));
        let (view, out) = (w.view(), s.out());
        let a = GroupNormFwd {
            x: x.view(),
            w: view,
            b: view,
            y: y.out(),
            mean: out,
            rstd: out,
            eps: 1e-6,
            silu: false,
        };
        dev.group_norm_fwd(S, &a)
    };
    refuses(norm(5, 3), "group_norm_fwd", &["w", "b"]);
    refuses(norm(6, 4), "group_norm_fwd", &["mean", "rstd", "x", "groups"]);
    let (x, w, y) = (m.f32([3, 4]), m.f32([5]), m.f32([3, 4]));
    let rstd = m.f32([3]);
    let a = RmsNormFwd {
        x: x.view(),
        residual: None,
        w: w.view(),
        sum: None,
        y: y.out(),
        rstd: rstd.out(),
        eps: 1e-6,
    };
    refuses(dev.rms_norm_fwd(S, &a), "rms_norm_fwd", &["w"]);
}

#[test]
fn pointwise_kernels_name_what_does_not_fit() {
    let dev = cpu(1);
    let m = Maker(dev.clone());
    let (x, y) = (m.f32([3, 4]), m.f32([3, 5]));
    refuses(dev.add(S, &Add { a: x.view(), b: y.view(), y: x.out() }), "add", &["b", "y"]);
    refuses(
        dev.unary_fwd(S, &UnaryFwd { x: x.view(), y: y.out(), f: Unary::Silu }),
        "unary_fwd",
        &["y", "x"],
    );
    refuses(dev.cast(S, &Cast { x: x.view(), y: y.out() }), "cast", &["y", "x"]);
    refuses(dev.swiglu_fwd(S, &SwigluFwd { gate_up: x.view(), y: y.out() }), "swiglu_fwd", &["y", "gate_up"]);
    let rope = |x: &Tensor, position: &[i32], heads: usize, head_dim: usize| {
        let (position, y) = (int(&*dev, position), m.f32(x.dims()));
        let (x, position, y) = (x.view(), position.view(), y.out());
        dev.rope(S, &Rope { x, position, y, heads, head_dim, theta: 1e4, inverse: false })
    };
    rope(&x, &[0, 1, 2], 2, 2).expect("the right arguments are accepted");
    refuses(rope(&x, &[0, 1], 2, 2), "rope", &["position"]);
    refuses(rope(&x, &[0, 1, 2], 3, 2), "rope", &["x", "heads", "head_dim"]);
    refuses(rope(&x, &[0, 1, 2], 1, 3), "rope", &["head_dim"]);
}

#[test]
fn kernels_over_rows_name_what_does_not_fit() {
    let dev = cpu(1);
    let m = Maker(dev.clone());
    let table = m.f32([4, 3]);
    let gather = |idx: &[i32], y: [usize; 2]| {
        let (idx, y) = (int(&*dev, idx), m.f32(y));
        dev.gather_fwd(S, &GatherFwd { table: table.view(), idx: idx.view(), y: y.out() })
    };
    gather(&[0, 3, -1], [3, 3]).expect("the right arguments are accepted");
    refuses(gather(&[0, 4, -1], [3, 3]), "gather_fwd", &["idx"]);
    refuses(gather(&[0, 1], [3, 3]), "gather_fwd", &["idx", "y"]);
    refuses(gather(&[0, 1], [2, 4]), "gather_fwd", &["y"]);
    let xent = |target: &[i32], w: [usize; 2]| {
        let (target, w) = (int(&*dev, target), m.f32(w));
        let (lse, one) = (m.f32([4]), m.f32([1]));
        let (x, w, target) = (table.view(), w.view(), target.view());
        dev.linear_xent_fwd(
            S,
            &LinearXentFwd { x, w, target, scale: one.view(), lse: lse.out(), loss: one.out() },
        )
    };
    refuses(xent(&[0, 1, 2, 5], [5, 3]), "linear_xent_fwd", &["target"]);
    refuses(xent(&[0, 1, 2], [5, 3]), "linear_xent_fwd", &["target"]);
    refuses(xent(&[0, 1, 2, 3], [5, 4]), "linear_xent_fwd", &["w"]);
    let attention = |heads: usize, kv_heads: usize, cu: &[i32], q: usize| {
        let (q, k) = (m.f32([4, q]), m.f32([4, 2 * kv_heads]));
        let (y, lse, cu) = (m.f32(q.dims()), m.f32([4, heads]), int(&*dev, cu));
        let (q, k, cu) = (q.view(), k.view(), cu.view());
        let a = AttentionFwd {
            q,
            k,
            v: k,
            cu_q: cu,
            cu_k: cu,
            y: y.out(),
            lse: lse.out(),
            heads,
            kv_heads,
            head_dim: 2,
            max_q: 4,
            max_k: 4,
            scale: 1.0,
            causal: true,
        };
        dev.attention_fwd(S, &a)
    };
    attention(2, 1, &[0, 1, 4], 4).expect("the right arguments are accepted");
    refuses(attention(3, 2, &[0, 1, 4], 6), "attention_fwd", &["kv_heads", "heads"]);
    refuses(attention(2, 1, &[0, 1, 5], 4), "attention_fwd", &["cu_q", "cu_k"]);
    refuses(attention(2, 1, &[0, 3, 1], 4), "attention_fwd", &["cu_q", "cu_k"]);
    refuses(attention(2, 1, &[0, 1, 4], 6), "attention_fwd", &["q"]);
    let (z, e, one) = (m.f32([2, 3]), m.f32([5, 4]), m.f32([2]));
    let idx = int(&*dev, &[0, 0]);
    let a = IbqRows {
        z: z.view(),
        e: e.view(),
        idx: idx.out(),
        smax: one.out(),
        rest_p: one.out(),
        rest_q: one.out(),
        xbar: one.out(),
        bad: one.acc(),
        temperature: 1.0,
    };
    refuses(dev.ibq_rows(S, &a), "ibq_rows", &["e"]);
}

#[test]
fn tensors_name_what_does_not_fit() -> Outcome {
    let dev = cpu(1);
    let m = Maker(dev.clone());
    let t = m.f32([3, 4]);
    let none = |r: Result<Tensor>| r.map(|_| ());
    refuses(none(t.rows(2, 2)), "rows", &["start + n"]);
    refuses(none(t.columns(3, 2)), "columns", &["start + n"]);
    refuses(none(t.range(10, 3)), "range", &["start + n"]);
    refuses(none(t.reshape([5])), "reshape", &["dims"]);
    let slice = t.columns(1, 2)?;
    assert!(!slice.is_contiguous() && slice.to_f64(&*dev)?.len() == 6);
    refuses(none(slice.reshape([6])), "reshape", &["dims"]);
    refuses(none(slice.range(0, 2)), "range", &["start + n"]);
    refuses(none(Tensor::from_host(&*dev, Role::Input, &[1f32; 3], [2, 2])), "from_host", &["values"]);
    refuses(t.to_host::<f64>(&*dev).map(|_| ()), "to_host", &["T"]);
    refuses(dev.copy_in(S, &[0; 7], t.out()), "copy_in", &["src"]);
    // A view that leaves its buffer.
    let mut view = t.view();
    view.off = 4;
    refuses(dev.cast(S, &Cast { x: view, y: t.out() }), "cast", &["x"]);
    view.off = 0;
    view.ld = 2;
    refuses(dev.cast(S, &Cast { x: view, y: t.out() }), "cast", &["x"]);
    Ok(())
}

#[test]
fn kernels_are_listed_once_with_their_arguments() {
    let mut names: Vec<&str> = KERNELS.iter().map(|(name, _)| *name).collect();
    let n = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), n);
    for (name, fields) in KERNELS {
        assert!(!fields.is_empty(), "{name}");
        let writes = |t: &str| t.contains("Out") || t.contains("Acc");
        assert!(fields.iter().any(|(_, t)| writes(t)), "{name} writes nothing");
    }
}
