//! The errors of kernels and tensors for arguments that violate the contract: one sentence that names the argument.
//! The rules hold for any device: [`refusals`] tests all of them. The conformance driver changes the shape and type
//! of each argument of each kernel; this file covers numbers, data and special cases.

use std::sync::Arc;

use ett::backend::spec::{FieldSpec, Kind};
use ett::backend::{
    Access, Add, Arange, AttentionFwd, Cast, Conv2dFwd, DType, Dims, GatherFwd, GroupNormFwd, IbqRows, In,
    KERNELS, Kernels, LinearXentFwd, Matmul, MatmulAcc, Pick, RmsNormFwd, Role, Rope, Stream, SwigluFwd,
    Unary, UnaryFwd,
};
use ett::error::{Error, Result};
use ett::tensor::Tensor;

use crate::common::{cpu, int, tensor};

const S: Stream = Stream::COMPUTE;

/// A device.
struct Subject {
    dev: Arc<dyn Kernels>,
}

impl Subject {
    /// Waits for earlier calls: kernels report errors in the data with the next values that are read.
    fn done(&self) -> Result<()> {
        self.f32([1]).to_f64(&*self.dev).map(|_| ())
    }

    fn f32(&self, dims: impl Into<Dims>) -> Tensor {
        self.of(DType::F32, dims)
    }
    fn of(&self, dtype: DType, dims: impl Into<Dims>) -> Tensor {
        let dims = dims.into();
        tensor(&*self.dev, dtype, &vec![0.5; dims.numel()], dims)
    }

    /// Expects the error of `op` about one of `args`.
    fn refuses(&self, result: Result<()>, op: &str, args: &[&str]) {
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

    /// The same for errors in the data, which a device may report after the call.
    fn refuses_data(&self, result: Result<()>, op: &str, args: &[&str]) {
        self.refuses(result.and_then(|()| self.done()), op, args);
    }

    /// Expects no error.
    fn accepts(&self, result: Result<()>) {
        if let Err(e) = result.and_then(|()| self.done()) {
            panic!("the right arguments were refused: {e}");
        }
    }
}

/// Runs all checks on `dev`.
pub fn refusals(dev: Arc<dyn Kernels>) {
    let subject = Subject { dev };
    for part in [products, convolutions_and_norms, pointwise, over_rows, tensors] {
        part(&subject);
    }
}

/// Runs one part on the CPU.
fn on_cpu(part: fn(&Subject)) {
    part(&Subject { dev: cpu(1) });
}

#[test]
fn products_name_what_does_not_fit() {
    on_cpu(products);
}

#[test]
fn convolutions_and_norms_name_what_does_not_fit() {
    on_cpu(convolutions_and_norms);
}

#[test]
fn pointwise_kernels_name_what_does_not_fit() {
    on_cpu(pointwise);
}

#[test]
fn kernels_over_rows_name_what_does_not_fit() {
    on_cpu(over_rows);
}

#[test]
fn tensors_name_what_does_not_fit() {
    on_cpu(tensors);
}

fn products(m: &Subject) {
    let dev = &m.dev;
    let (a, b, y) = (m.f32([3, 4]), m.f32([5, 4]), m.f32([3, 5]));
    let run = |a: &Tensor, b: &Tensor, bias: Option<&Tensor>, y: &Tensor| {
        let bias = bias.map(Tensor::view);
        dev.matmul(S, &Matmul { a: a.view(), b: b.view(), ta: false, tb: true, bias, y: y.out() })
    };
    m.accepts(run(&a, &b, Some(&m.f32([5])), &y));
    m.refuses(run(&a, &m.f32([5, 3]), None, &y), "matmul", &["a", "b"]);
    m.refuses(run(&a, &b, None, &m.f32([3, 4])), "matmul", &["y"]);
    m.refuses(run(&a, &b, None, &m.f32([2, 5])), "matmul", &["y"]);
    m.refuses(run(&a, &b, Some(&m.f32([4])), &y), "matmul", &["bias"]);
    m.refuses(run(&a, &m.of(DType::F64, [5, 4]), None, &y), "matmul", &["a", "b"]);
    m.refuses(run(&a, &b, None, &m.of(DType::Bf16, [3, 5])), "matmul", &["y", "a"]);
    let acc = |y: &Tensor| {
        dev.matmul_acc(
            S,
            &MatmulAcc { a: a.view(), b: y.view(), ta: true, tb: false, y: m.f32([4, 5]).acc() },
        )
    };
    m.accepts(acc(&y));
    m.refuses(acc(&m.f32([4, 5])), "matmul_acc", &["a", "b"]);
}

fn convolutions_and_norms(m: &Subject) {
    let dev = &m.dev;
    let x = m.f32([1, 4, 4, 6]);
    let conv = |w: [usize; 4], y: [usize; 4]| {
        let (w, y) = (m.f32(w), m.f32(y));
        let a = Conv2dFwd::plain([x.view(), w.view()], None, y.out(), 1, [1, 1]);
        dev.conv2d_fwd(S, &a)
    };
    m.accepts(conv([2, 3, 3, 6], [1, 4, 4, 2]));
    m.refuses(conv([2, 3, 3, 5], [1, 4, 4, 2]), "conv2d_fwd", &["w", "x"]);
    m.refuses(conv([2, 3, 3, 6], [1, 4, 4, 3]), "conv2d_fwd", &["y", "w"]);
    m.refuses(conv([2, 3, 3, 6], [2, 4, 4, 2]), "conv2d_fwd", &["y"]);
    let norm = |c: usize, groups: usize| {
        let (w, y) = (m.f32([c]), m.f32([1, 4, 4, 6]));
        let (mean, rstd) = (m.f32([1, groups]), m.f32([1, groups]));
        let view = w.view();
        let a = GroupNormFwd {
            x: x.view(),
            w: view,
            b: view,
            y: y.out(),
            mean: mean.out(),
            rstd: rstd.out(),
            eps: 1e-6,
            silu: false,
        };
        dev.group_norm_fwd(S, &a)
    };
    m.refuses(norm(5, 3), "group_norm_fwd", &["w", "b"]);
    m.refuses(norm(6, 4), "group_norm_fwd", &["mean", "rstd", "x", "groups"]);
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
    m.refuses(dev.rms_norm_fwd(S, &a), "rms_norm_fwd", &["w"]);
}

fn pointwise(m: &Subject) {
    let dev = &m.dev;
    let (x, y) = (m.f32([3, 4]), m.f32([3, 5]));
    m.refuses(dev.add(S, &Add { a: x.view(), b: y.view(), y: x.out() }), "add", &["b", "y"]);
    m.refuses(
        dev.unary_fwd(S, &UnaryFwd { x: x.view(), y: y.out(), f: Unary::Silu }),
        "unary_fwd",
        &["y", "x"],
    );
    m.refuses(dev.cast(S, &Cast { x: x.view(), y: y.out() }), "cast", &["y", "x"]);
    m.refuses(
        dev.swiglu_fwd(S, &SwigluFwd { gate_up: x.view(), y: y.out() }),
        "swiglu_fwd",
        &["y", "gate_up"],
    );
    let rope = |x: &Tensor, position: &[i32], heads: usize, head_dim: usize| {
        let (position, y) = (int(&**dev, position), m.f32(x.dims()));
        let (x, position, y) = (x.view(), position.view(), y.out());
        dev.rope(S, &Rope { x, position, y, heads, head_dim, theta: 1e4, inverse: false })
    };
    m.accepts(rope(&x, &[0, 1, 2], 2, 2));
    m.refuses(rope(&x, &[0, 1], 2, 2), "rope", &["position"]);
    m.refuses(rope(&x, &[0, 1, 2], 3, 2), "rope", &["x", "heads", "head_dim"]);
    m.refuses(rope(&x, &[0, 1, 2], 1, 3), "rope", &["head_dim"]);
}

fn over_rows(m: &Subject) {
    let dev = &m.dev;
    let table = m.f32([4, 3]);
    let gather = |idx: &[i32], y: [usize; 2]| {
        let (idx, y) = (int(&**dev, idx), m.f32(y));
        dev.gather_fwd(S, &GatherFwd { table: table.view(), idx: idx.view(), y: y.out() })
    };
    m.accepts(gather(&[0, 3, -1], [3, 3]));
    m.refuses_data(gather(&[0, 4, -1], [3, 3]), "gather_fwd", &["idx"]);
    m.refuses(gather(&[0, 1], [3, 3]), "gather_fwd", &["idx", "y"]);
    m.refuses(gather(&[0, 1], [2, 4]), "gather_fwd", &["y"]);
    let pick = |idx: &[i32]| {
        let (x, idx, y) = (int(&**dev, &[7, 8, 9]), int(&**dev, idx), int(&**dev, &[0; 2]));
        dev.pick(S, &Pick { x: x.view(), idx: idx.view(), y: y.out() })
    };
    m.accepts(pick(&[2, i32::MIN]));
    m.refuses_data(pick(&[0, 3]), "pick", &["idx"]);
    m.refuses(pick(&[0]), "pick", &["idx", "y"]);
    let arange = |n: usize, step: usize| {
        let y = int(&**dev, &vec![0; n]);
        dev.arange(S, &Arange { y: y.out(), step })
    };
    m.accepts(arange(0, 1 << 30));
    m.accepts(arange(2, (1 << 31) - 1));
    for (n, step) in [(1, 1 << 31), (3, 1 << 30), (2, usize::MAX)] {
        m.refuses(arange(n, step), "arange", &["step"]);
    }
    let xent = |target: &[i32], w: [usize; 2]| {
        let (target, w) = (int(&**dev, target), m.f32(w));
        let (lse, scale, loss) = (m.f32([4]), m.f32([1]), m.f32([1]));
        let (x, w, target, scale) = (table.view(), w.view(), target.view(), scale.view());
        dev.linear_xent_fwd(S, &LinearXentFwd { x, w, target, scale, lse: lse.out(), loss: loss.out() })
    };
    m.refuses_data(xent(&[0, 1, 2, 5], [5, 3]), "linear_xent_fwd", &["target"]);
    m.refuses(xent(&[0, 1, 2], [5, 3]), "linear_xent_fwd", &["target"]);
    m.refuses(xent(&[0, 1, 2, 3], [5, 4]), "linear_xent_fwd", &["w"]);
    let cached = |heads: usize, kv_heads: usize, cu: &[i32], len: Option<&[i32]>, q: usize| {
        let (q, k) = (m.f32([4, q]), m.f32([4, 2 * kv_heads]));
        let (y, lse, cu) = (m.f32(q.dims()), m.f32([4, heads]), int(&**dev, cu));
        let len = len.map(|len| int(&**dev, len));
        // If the keys are slots of a cache: one query per sequence, without gaps.
        let one: Vec<i32> = (0..cu.dims().numel() as i32).collect();
        let one = int(&**dev, &one);
        let (q, k, cu, cu_q) = (q.view(), k.view(), cu.view(), one.view());
        let a = AttentionFwd {
            q,
            k,
            v: k,
            cu_q: if len.is_some() { cu_q } else { cu },
            cu_k: cu,
            len_k: len.as_ref().map(Tensor::view),
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
    let attention = |heads, kv_heads, cu: &[i32], q| cached(heads, kv_heads, cu, None, q);
    m.accepts(attention(2, 1, &[0, 1, 4], 4));
    m.refuses(attention(3, 2, &[0, 1, 4], 6), "attention_fwd", &["kv_heads", "heads"]);
    m.refuses_data(attention(2, 1, &[0, 1, 5], 4), "attention_fwd", &["cu_q", "cu_k"]);
    m.refuses_data(attention(2, 1, &[0, 3, 1], 4), "attention_fwd", &["cu_q", "cu_k"]);
    m.refuses(attention(2, 1, &[0, 1, 4], 6), "attention_fwd", &["q"]);
    // Slots may lie anywhere, and the last offset is ignored.
    m.accepts(cached(2, 1, &[3, 0, -1], Some(&[1, 2]), 4));
    m.accepts(cached(2, 1, &[4, 0, 9], Some(&[0, 4]), 4));
    m.refuses(cached(2, 1, &[3, 0, -1], Some(&[1]), 4), "attention_fwd", &["len_k", "cu_q", "cu_k"]);
    m.refuses(cached(2, 1, &[3, 0, -1], Some(&[1, 2, 0]), 4), "attention_fwd", &["len_k", "cu_q", "cu_k"]);
    // A device may report any wrong sequence offset or length under the name of one of these arguments.
    let places = ["cu_q", "cu_k", "len_k"];
    for (starts, len) in [
        ([3, 0, 0], [2, 1]),
        ([0, 0, 0], [5, 1]),
        ([0, 1, 0], [1, -1]),
        ([5, 0, 0], [0, 1]),
        ([-1, 0, 0], [1, 1]),
    ] {
        m.refuses_data(cached(2, 1, &starts, Some(&len), 4), "attention_fwd", &places);
    }
    let (z, e, bad) = (m.f32([2, 3]), m.f32([5, 4]), m.f32([1]));
    let (idx, stats) = (int(&**dev, &[0, 0]), [(); 4].map(|()| m.f32([2])));
    let a = IbqRows {
        z: z.view(),
        e: e.view(),
        idx: idx.out(),
        smax: stats[0].out(),
        rest_p: stats[1].out(),
        rest_q: Some(stats[2].out()),
        xbar: Some(stats[3].out()),
        bad: bad.acc(),
        temperature: 1.0,
    };
    m.refuses(dev.ibq_rows(S, &a), "ibq_rows", &["e"]);
    m.refuses(dev.ibq_rows(S, &IbqRows { e: z.view(), xbar: None, ..a }), "ibq_rows", &["xbar"]);
}

fn tensors(m: &Subject) {
    let dev = &m.dev;
    let t = m.f32([3, 4]);
    let none = |r: Result<Tensor>| r.map(|_| ());
    m.refuses(none(t.rows(2, 2)), "rows", &["start + n"]);
    m.refuses(none(t.columns(3, 2)), "columns", &["start + n"]);
    m.refuses(none(t.range(10, 3)), "range", &["start + n"]);
    m.refuses(none(t.reshape([5])), "reshape", &["dims"]);
    let slice = t.columns(1, 2).expect("two columns of four");
    assert!(!slice.is_contiguous() && slice.to_f64(&**dev).is_ok_and(|v| v.len() == 6));
    m.refuses(none(slice.reshape([6])), "reshape", &["self"]);
    m.refuses(none(slice.range(0, 2)), "range", &["self"]);
    m.refuses(none(Tensor::from_host(&**dev, Role::Input, &[1f32; 3], [2, 2])), "from_host", &["values"]);
    m.refuses(t.to_host::<f64>(&**dev).map(|_| ()), "to_host", &["T"]);
    m.refuses(dev.copy_in(S, &[0; 7], t.out()), "copy_in", &["src"]);
    // Sums that overflow.
    m.refuses(none(t.rows(usize::MAX, 2)), "rows", &["start + n"]);
    m.refuses(none(t.columns(2, usize::MAX)), "columns", &["start + n"]);
    m.refuses(none(t.range(usize::MAX, usize::MAX)), "range", &["start + n"]);
    // Sizes that overflow: 2^60 x 4 elements of 4 bytes wrap to 0 bytes, (2^63 + 3) x 2 x 4 elements to 24.
    for dims in [[1 << 60, 4, 1], [(1 << 63) + 3, 2, 4], [usize::MAX; 3]] {
        m.refuses(none(Tensor::empty(&**dev, Role::Input, DType::F32, dims)), "empty", &["dims"]);
        m.refuses(none(t.reshape(dims)), "reshape", &["dims"]);
    }
    m.refuses(none(m.f32([0, 5]).reshape([0, 1 << 60, 1 << 60])), "reshape", &["dims"]);
    // Views that leave their buffer.
    let buf = t.view().buffer();
    let view = |off, dims: [usize; 2], ld| In::new(buf, off, DType::F32, dims, ld).map(|_| ());
    assert!(view(0, [3, 4], 4).is_ok() && view(4, [3, 3], 4).is_ok() && view(48, [0, 4], 4).is_ok());
    for wrong in [
        view(4, [3, 4], 4),
        view(2, [1, 4], 4),
        view(0, [3, 4], 2),
        view(0, [3, 4], -4),
        view(0, [3, 4], i64::MAX),
        view(u64::MAX - 3, [3, 4], 4),
        view(0, [1 << 62, 4], 4),
    ] {
        m.refuses(wrong, "view", &["extent"]);
    }
}

#[test]
fn kernels_are_listed_once_with_their_arguments() {
    let mut names: Vec<&str> = KERNELS.iter().map(|k| k.name).collect();
    let n = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), n);
    for k in KERNELS {
        let writes = |f: &FieldSpec| match f.kind {
            Kind::Tensor { access, .. } => access != Access::Read,
            _ => false,
        };
        assert!(k.fields.iter().any(writes), "{} writes nothing", k.name);
    }
}
