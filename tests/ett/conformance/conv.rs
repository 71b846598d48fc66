//! Convolution and its gradients.

use ett::backend::{Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, DType, Stream};

use super::Size;
use super::case::{Case, Draw, Near, Type, act, add, near, out};

const S: Stream = Stream::COMPUTE;

/// `x [B, H, W, C]`, O outputs of a kernel of `taps`, and the sizes H' and W' of y, which imply the padding at the
/// bottom and on the right.
#[derive(Clone, Copy)]
struct Shape {
    x: [usize; 4],
    outputs: usize,
    taps: [usize; 2],
    to: [usize; 2],
    stride: usize,
    pad: [usize; 2],
}

const fn shape(
    x: [usize; 4],
    outputs: usize,
    taps: [usize; 2],
    to: [usize; 2],
    stride: usize,
    pad: [usize; 2],
) -> Shape {
    Shape { x, outputs, taps, to, stride, pad }
}

/// One of every kind: products of pixels, few inputs, few outputs, phases.
const FIRST: [Shape; 6] = [
    shape([1, 4, 5, 16], 16, [3, 3], [4, 5], 1, [1, 1]),
    shape([1, 5, 4, 16], 3, [3, 3], [5, 4], 1, [1, 1]),
    shape([1, 4, 4, 3], 8, [3, 3], [4, 4], 1, [1, 1]),
    shape([1, 6, 6, 3], 8, [4, 4], [3, 3], 2, [1, 1]),
    shape([1, 6, 5, 8], 4, [4, 4], [3, 2], 1, [0, 0]),
    shape([1, 4, 4, 8], 8, [3, 3], [2, 2], 2, [0, 0]),
];

const SMALL: [Shape; 22] = [
    shape([1, 1, 1, 1], 1, [1, 1], [1, 1], 1, [0, 0]),
    shape([2, 5, 7, 3], 5, [3, 3], [5, 7], 1, [1, 1]),
    shape([2, 6, 5, 8], 16, [3, 3], [6, 5], 1, [1, 1]),
    shape([1, 19, 18, 3], 3, [3, 3], [19, 18], 1, [1, 1]),
    shape([1, 18, 17, 8], 1, [3, 3], [18, 17], 1, [1, 1]),
    // The one-sided padding of the encoder: none above, one line below.
    shape([2, 8, 6, 8], 8, [3, 3], [4, 3], 2, [0, 0]),
    shape([2, 7, 6, 3], 4, [3, 3], [4, 3], 2, [0, 0]),
    shape([1, 9, 11, 16], 8, [3, 3], [5, 6], 2, [1, 1]),
    // The discriminator's.
    shape([2, 8, 8, 3], 16, [4, 4], [4, 4], 2, [1, 1]),
    shape([1, 8, 6, 8], 16, [4, 4], [4, 3], 2, [1, 1]),
    shape([2, 7, 7, 8], 1, [4, 4], [6, 6], 1, [1, 1]),
    shape([3, 5, 7, 5], 7, [1, 1], [5, 7], 1, [0, 0]),
    shape([2, 6, 6, 24], 16, [1, 1], [6, 6], 1, [0, 0]),
    shape([1, 7, 7, 8], 8, [1, 1], [4, 4], 2, [0, 0]),
    // As many positions as pixels, but others.
    shape([2, 4, 5, 3], 2, [1, 1], [4, 5], 1, [1, 1]),
    shape([2, 3, 2, 1], 2, [5, 5], [3, 2], 1, [2, 2]),
    shape([1, 9, 8, 8], 8, [5, 5], [9, 8], 1, [2, 2]),
    shape([2, 6, 6, 8], 7, [2, 3], [7, 5], 1, [1, 0]),
    shape([1, 5, 4, 2], 3, [2, 3], [3, 2], 3, [2, 0]),
    shape([1, 10, 10, 8], 8, [4, 4], [4, 4], 3, [1, 0]),
    shape([1, 3, 70, 8], 8, [1, 9], [3, 70], 1, [0, 4]),
    shape([0, 4, 4, 8], 8, [3, 3], [4, 4], 1, [1, 1]),
];

const LARGE: [Shape; 14] = [
    shape([2, 64, 64, 128], 128, [3, 3], [64, 64], 1, [1, 1]),
    shape([1, 65, 63, 64], 64, [3, 3], [65, 63], 1, [1, 1]),
    shape([2, 64, 64, 128], 256, [3, 3], [32, 32], 2, [0, 0]),
    shape([2, 96, 96, 3], 128, [3, 3], [96, 96], 1, [1, 1]),
    shape([2, 96, 96, 128], 3, [3, 3], [96, 96], 1, [1, 1]),
    shape([2, 64, 64, 3], 64, [4, 4], [32, 32], 2, [1, 1]),
    shape([2, 32, 32, 64], 128, [4, 4], [16, 16], 2, [1, 1]),
    shape([2, 31, 31, 512], 1, [4, 4], [30, 30], 1, [1, 1]),
    shape([1, 40, 40, 256], 256, [1, 1], [40, 40], 1, [0, 0]),
    shape([1, 33, 29, 33], 31, [3, 3], [33, 29], 1, [1, 1]),
    shape([1, 17, 19, 512], 512, [3, 3], [17, 19], 1, [1, 1]),
    shape([2, 24, 24, 40], 72, [5, 5], [24, 24], 1, [2, 2]),
    shape([1, 300, 257, 8], 8, [3, 3], [300, 257], 1, [1, 1]),
    shape([64, 4, 4, 128], 136, [3, 3], [4, 4], 1, [1, 1]),
];

const SAMPLE: Shape = shape([2, 5, 6, 3], 7, [2, 4], [5, 4], 1, [1, 0]);

fn cases(case: fn(Shape, bool) -> Case) -> Vec<Case> {
    let first = FIRST.into_iter().map(|s| (Size::Sanitizer, s));
    let all = first.chain(SMALL.map(|s| (Size::Tiny, s))).chain(LARGE.map(|s| (Size::Full, s)));
    all.enumerate().map(|(i, (size, shape))| case(shape, i % 3 != 1).from(size)).collect()
}

impl Shape {
    fn w(&self) -> [usize; 4] {
        [self.outputs, self.taps[0], self.taps[1], self.x[3]]
    }

    fn y(&self) -> [usize; 4] {
        [self.x[0], self.to[0], self.to[1], self.outputs]
    }

    fn text(&self) -> String {
        let Shape { x, outputs, taps: [kh, kw], to, stride, pad } = self;
        format!("{x:?} to {to:?} x {outputs}, {kh}x{kw}, stride {stride}, padding {pad:?}")
    }
}

fn numel(dims: [usize; 4]) -> usize {
    dims.iter().product()
}

/// Of sums of `terms` products of two operands of the run's scale. Tensor cores truncate their sums: see the products.
fn sums(d: &Draw, terms: usize) -> Near {
    let near = near().size(d.scale * d.scale * (terms as f64).sqrt());
    if d.prec.act == DType::Bf16 { near.conditioning(terms as f64 / 128.0) } else { near }
}

fn fwd_case(s: Shape, bias: bool) -> Case {
    let with = if bias { " with bias" } else { "" };
    Case::new(
        s.text() + with,
        move |d| {
            let mut args = vec![act("x", s.x, d.normal(numel(s.x))), act("w", s.w(), d.normal(numel(s.w())))];
            if bias {
                args.push(act("bias", [s.outputs], d.normal(s.outputs)));
            }
            args.push(out("y", Type::Act, s.y(), sums(d, numel(s.w()) / s.outputs)));
            args
        },
        move |dev, v| {
            let (x, w, bias, y) = (v.input("x"), v.input("w"), v.input_if("bias"), v.out("y"));
            let Shape { stride, pad: [pad_top, pad_left], .. } = s;
            dev.conv2d_fwd(S, &Conv2dFwd { x, w, bias, y, stride, pad_top, pad_left })
        },
    )
}

pub fn fwd() -> Vec<Case> {
    cases(fwd_case)
}

pub fn fwd_sample() -> Case {
    fwd_case(SAMPLE, true)
}

fn bwd_data_case(s: Shape, _: bool) -> Case {
    Case::new(
        s.text(),
        move |d| {
            vec![
                act("dy", s.y(), d.normal(numel(s.y()))),
                act("w", s.w(), d.normal(numel(s.w()))),
                out("dx", Type::Act, s.x, sums(d, numel(s.w()) / s.x[3])),
            ]
        },
        move |dev, v| {
            let (dy, w, dx) = (v.input("dy"), v.input("w"), v.out("dx"));
            let Shape { stride, pad: [pad_top, pad_left], .. } = s;
            dev.conv2d_bwd_data(S, &Conv2dBwdData { dy, w, dx, stride, pad_top, pad_left })
        },
    )
}

pub fn bwd_data() -> Vec<Case> {
    cases(bwd_data_case)
}

pub fn bwd_data_sample() -> Case {
    bwd_data_case(SAMPLE, false)
}

fn bwd_weight_case(s: Shape, bias: bool) -> Case {
    let with = if bias { " with bias" } else { "" };
    Case::new(
        s.text() + with,
        move |d| {
            let positions = numel(s.y()) / s.outputs;
            let size = d.scale * d.scale * (positions as f64).sqrt();
            let start = d.times(size.max(d.scale), numel(s.w()));
            let mut args = vec![
                act("x", s.x, d.normal(numel(s.x))),
                act("dy", s.y(), d.normal(numel(s.y()))),
                add("dw", Type::Acc, s.w(), start, sums(d, positions)),
            ];
            if bias {
                let size = d.scale * (positions as f64).sqrt();
                args.push(add("db", Type::Acc, [s.outputs], d.times(size, s.outputs), near().size(size)));
            }
            args
        },
        move |dev, v| {
            let (x, dy, dw, db) = (v.input("x"), v.input("dy"), v.acc("dw"), v.acc_if("db"));
            let Shape { stride, pad: [pad_top, pad_left], .. } = s;
            dev.conv2d_bwd_weight(S, &Conv2dBwdWeight { x, dy, dw, db, stride, pad_top, pad_left })
        },
    )
}

pub fn bwd_weight() -> Vec<Case> {
    cases(bwd_weight_case)
}

pub fn bwd_weight_sample() -> Case {
    bwd_weight_case(SAMPLE, true)
}
