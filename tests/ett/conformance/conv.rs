//! Convolution and its gradients.

use ett::backend::{
    Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, DType, Stream, Upsample2xWeightsBwd, Upsample2xWeightsFwd,
};

use super::Size;
use super::case::{Arg, Case, Draw, Near, Type, acc, act, add, near, out};
use super::norms::{CENTRING, EPS, group_statistics};

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
const FIRST: [Shape; 8] = [
    shape([1, 4, 5, 16], 16, [3, 3], [4, 5], 1, [1, 1]),
    shape([1, 5, 4, 16], 3, [3, 3], [5, 4], 1, [1, 1]),
    shape([1, 4, 4, 3], 8, [3, 3], [4, 4], 1, [1, 1]),
    shape([1, 6, 6, 3], 8, [4, 4], [3, 3], 2, [1, 1]),
    shape([1, 6, 5, 8], 4, [4, 4], [3, 2], 1, [0, 0]),
    shape([1, 4, 4, 8], 8, [3, 3], [2, 2], 2, [0, 0]),
    // Panels of 64 channels.
    shape([1, 5, 9, 64], 32, [3, 3], [5, 9], 1, [1, 1]),
    shape([1, 6, 6, 64], 32, [4, 4], [3, 3], 2, [1, 1]),
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

const LARGE: [Shape; 19] = [
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
    // More tiles than multiprocessors, and tiles with borders on all sides.
    shape([3, 100, 106, 64], 136, [3, 3], [100, 106], 1, [1, 1]),
    shape([2, 33, 70, 128], 64, [3, 3], [17, 35], 2, [1, 1]),
    shape([2, 23, 21, 64], 192, [4, 4], [22, 20], 1, [1, 1]),
    shape([1, 35, 37, 192], 64, [4, 4], [17, 18], 2, [1, 1]),
    shape([1, 41, 40, 128], 64, [5, 5], [41, 40], 1, [2, 2]),
];

const SAMPLE: Shape = shape([2, 5, 6, 9], 14, [2, 4], [5, 4], 1, [1, 0]);

fn cases(case: impl Fn(Shape, bool) -> Case) -> Vec<Case> {
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

/// A GroupNorm of the input, and what else a fused convolution does.
#[derive(Clone, Copy, Default)]
struct With {
    bias: bool,
    /// Groups of the input's norm.
    norm: Option<usize>,
    /// A residual; in the data gradient, what is added to it.
    residual: bool,
    /// Groups of the output's statistics.
    stats: Option<usize>,
    /// Only the residual counts, and its mean is that many standard deviations.
    offset: f64,
    /// Gradients of scale and shift.
    scale: bool,
}

/// Shapes with numbers of groups of the input and the output.
const FUSED_FIRST: [(Shape, usize, usize); 5] = [
    (shape([1, 4, 5, 32], 16, [3, 3], [4, 5], 1, [1, 1]), 4, 2),
    (shape([1, 5, 4, 16], 3, [3, 3], [5, 4], 1, [1, 1]), 2, 1),
    (shape([1, 4, 4, 3], 16, [3, 3], [4, 4], 1, [1, 1]), 1, 2),
    (shape([1, 6, 5, 8], 8, [3, 3], [3, 2], 2, [0, 0]), 2, 1),
    (shape([1, 5, 9, 64], 32, [3, 3], [5, 9], 1, [1, 1]), 16, 4),
];
const FUSED_SMALL: [(Shape, usize, usize); 14] = [
    (shape([2, 9, 17, 32], 20, [3, 3], [9, 17], 1, [1, 1]), 8, 2),
    (shape([1, 3, 4, 64], 24, [3, 3], [3, 4], 1, [1, 1]), 16, 3),
    (shape([3, 5, 3, 32], 3, [3, 3], [5, 3], 1, [1, 1]), 4, 1),
    (shape([2, 17, 18, 16], 1, [3, 3], [17, 18], 1, [1, 1]), 2, 1),
    (shape([2, 4, 5, 40], 32, [3, 3], [4, 5], 1, [1, 1]), 5, 8),
    (shape([2, 9, 18, 3], 40, [3, 3], [9, 18], 1, [1, 1]), 1, 5),
    (shape([1, 10, 6, 32], 136, [3, 3], [10, 6], 1, [1, 1]), 2, 17),
    // Other padding, and more or fewer positions than pixels.
    (shape([1, 9, 17, 32], 32, [3, 3], [11, 19], 1, [2, 2]), 8, 4),
    (shape([1, 10, 18, 32], 33, [3, 3], [8, 16], 1, [0, 0]), 8, 3),
    (shape([2, 6, 5, 32], 24, [1, 1], [6, 5], 1, [0, 0]), 4, 2),
    (shape([1, 9, 8, 16], 16, [3, 3], [4, 4], 2, [0, 0]), 4, 2),
    (shape([1, 6, 7, 8], 8, [4, 4], [5, 6], 1, [1, 1]), 2, 2),
    (shape([0, 4, 4, 32], 32, [3, 3], [4, 4], 1, [1, 1]), 4, 4),
    (shape([2, 0, 4, 32], 32, [3, 3], [0, 4], 1, [1, 1]), 4, 4),
];
const FUSED_LARGE: [(Shape, usize, usize); 9] = [
    (shape([2, 64, 64, 128], 128, [3, 3], [64, 64], 1, [1, 1]), 32, 32),
    (shape([3, 37, 41, 128], 136, [3, 3], [37, 41], 1, [1, 1]), 32, 8),
    (shape([2, 16, 16, 512], 512, [3, 3], [16, 16], 1, [1, 1]), 32, 32),
    (shape([2, 65, 63, 128], 3, [3, 3], [65, 63], 1, [1, 1]), 32, 1),
    (shape([2, 96, 96, 3], 128, [3, 3], [96, 96], 1, [1, 1]), 1, 32),
    (shape([1, 33, 29, 64], 20, [3, 3], [33, 29], 1, [1, 1]), 8, 5),
    (shape([2, 100, 106, 128], 72, [3, 3], [100, 106], 1, [1, 1]), 32, 8),
    (shape([1, 70, 33, 192], 64, [3, 3], [71, 34], 1, [1, 2]), 16, 16),
    (shape([2, 33, 40, 64], 128, [3, 3], [17, 20], 2, [1, 1]), 4, 32),
];

/// The fused forms, alone and together.
fn fused(case: fn(Shape, With) -> Case) -> impl Iterator<Item = Case> {
    let all = FUSED_FIRST.into_iter().map(|s| (Size::Sanitizer, s));
    let all = all.chain(FUSED_SMALL.map(|s| (Size::Tiny, s))).chain(FUSED_LARGE.map(|s| (Size::Full, s)));
    all.enumerate().flat_map(move |(i, (size, (shape, groups, of_y)))| {
        let (norm, stats) = (Some(groups), Some(of_y));
        let whole = With { bias: true, norm, residual: true, stats, scale: true, offset: 0.0 };
        let part = match i % 4 {
            0 => With { norm, ..With::default() },
            1 => With { residual: true, norm, scale: true, ..With::default() },
            2 => With { stats, bias: true, ..With::default() },
            _ => With { norm, stats, ..With::default() },
        };
        [whole, part].map(|with| case(shape, with).from(size))
    })
}

fn fwd_case(s: Shape, with: With) -> Case {
    let named = [
        (with.bias, " with bias"),
        (with.norm.is_some(), " of a normalised input"),
        (with.residual, " with residual"),
        (with.stats.is_some(), " with statistics"),
    ];
    let named: String = named.into_iter().filter_map(|(there, text)| there.then_some(text)).collect();
    Case::new(
        s.text() + &named,
        move |d| {
            let x = d.normal(numel(s.x));
            let terms = numel(s.w()) / s.outputs;
            // The activation is of size 1, and rounded on the way.
            let mut size =
                if with.norm.is_some() { d.scale } else { d.scale * d.scale } * (terms as f64).sqrt();
            let mut args = Vec::new();
            if let Some(groups) = with.norm {
                args.extend(norm_args(d, &x, s.x, groups));
            }
            args.push(act("x", s.x, x));
            let factor = if with.offset > 0.0 { 0.0 } else { d.scale };
            args.push(act("w", s.w(), d.times(factor, numel(s.w()))));
            if with.bias {
                args.push(act("bias", [s.outputs], d.normal(s.outputs)));
                size = size.max(d.scale);
            }
            if with.residual {
                let residual = d.unit(numel(s.y())).iter().map(|v| d.scale * (v + with.offset)).collect();
                args.push(act("residual", s.y(), residual));
                size = size.max(d.scale);
            }
            let near = sums(d, terms).size(size);
            let near = if with.norm.is_some() { near.roundings(2.0).conditioning(CENTRING) } else { near };
            args.push(out("y", Type::Act, s.y(), near));
            if let Some(groups) = with.stats {
                // Of the rounded y, which the oracle does not round; with an offset y is the residual, exactly.
                let of = |near: Near| if numel(s.y()) == 0 { near.specials() } else { near };
                let lost = self::near().conditioning(CENTRING + with.offset / 4.0);
                let lost = if with.offset > 0.0 { lost } else { lost.coarse() };
                let dims = [s.x[0], groups];
                args.push(out("y_mean", Type::Acc, dims, of(lost.size(size))).dense());
                args.push(out("y_rstd", Type::Acc, dims, of(lost)).dense());
            }
            args
        },
        move |dev, v| {
            let a = Conv2dFwd {
                mean: v.input_if("mean"),
                rstd: v.input_if("rstd"),
                gamma: v.input_if("gamma"),
                beta: v.input_if("beta"),
                residual: v.input_if("residual"),
                y_mean: v.out_if("y_mean"),
                y_rstd: v.out_if("y_rstd"),
                eps: EPS,
                ..Conv2dFwd::plain(
                    [v.input("x"), v.input("w")],
                    v.input_if("bias"),
                    v.out("y"),
                    s.stride,
                    s.pad,
                )
            };
            dev.conv2d_fwd(S, &a)
        },
    )
}

/// The statistics of `x`, and a scale and a shift.
fn norm_args(d: &Draw, x: &[f64], dims: [usize; 4], groups: usize) -> [Arg; 4] {
    let [b, h, w, c] = dims;
    let (mean, rstd) = group_statistics(d, x, [b, h, w, c, groups]);
    // Without pixels there is nothing to normalise.
    let finite = |v: Vec<f64>| v.into_iter().map(|v| if v.is_finite() { v } else { 0.0 }).collect();
    [
        acc("mean", [b, groups], finite(mean)).dense(),
        acc("rstd", [b, groups], finite(rstd)).dense(),
        act("gamma", [c], d.unit(c)),
        act("beta", [c], d.unit(c)),
    ]
}

pub fn fwd() -> Vec<Case> {
    // The mean of the squares minus the square of the mean would be off by 1000^2 roundings.
    let far = |s: Shape, stats| {
        let with = With { residual: true, stats: Some(stats), offset: 1000.0, ..With::default() };
        fwd_case(s, with).named("mean of 1000 standard deviations")
    };
    let far = [
        far(shape([1, 20, 18, 32], 32, [3, 3], [20, 18], 1, [1, 1]), 4),
        far(shape([2, 7, 9, 8], 16, [3, 3], [7, 9], 1, [1, 1]), 2),
        far(shape([2, 9, 17, 3], 16, [3, 3], [9, 17], 1, [1, 1]), 2),
    ];
    let plain = |s, bias| fwd_case(s, With { bias, ..With::default() });
    cases(plain).into_iter().chain(fused(fwd_case)).chain(far).collect()
}

pub fn fwd_sample() -> Case {
    let with = With { bias: true, norm: Some(3), residual: true, stats: Some(7), ..With::default() };
    fwd_case(SAMPLE, with)
}

fn bwd_data_case(s: Shape, with: With) -> Case {
    let named = [
        (with.bias, " with bias"),
        (with.norm.is_some(), " through the norm"),
        (with.norm.is_some() && with.residual, " with skip"),
        (with.norm.is_some() && with.scale, " with scale"),
    ];
    let named: String = named.into_iter().filter_map(|(there, text)| there.then_some(text)).collect();
    Case::new(
        s.text() + &named,
        move |d| {
            let terms = numel(s.w()) / s.x[3];
            let mut args =
                vec![act("dy", s.y(), d.normal(numel(s.y()))), act("w", s.w(), d.normal(numel(s.w())))];
            if with.bias {
                args.push(act("bias", [s.x[3]], d.normal(s.x[3])));
            }
            let Some(groups) = with.norm else {
                args.push(out("dx", Type::Act, s.x, sums(d, terms)));
                return args;
            };
            let x = d.normal(numel(s.x));
            args.extend(norm_args(d, &x, s.x, groups));
            args.push(act("x", s.x, x));
            let inner = d.scale * d.scale * (terms as f64).sqrt();
            // Divided by the standard deviation of x.
            let size = inner / d.scale;
            if with.residual {
                args.push(act("skip", s.x, d.times(size, numel(s.x))));
            }
            let dx = sums(d, terms).size(size).roundings(2.0).conditioning(CENTRING + terms as f64 / 128.0);
            args.push(out("dx", Type::Act, s.x, dx));
            if with.scale {
                // Sums of gradients that were rounded to act.
                let (c, pixels) = (s.x[3], numel(s.x) / s.x[3]);
                let size = inner * (pixels as f64).sqrt().max(1.0);
                for name in ["dgamma", "dbeta"] {
                    args.push(add(name, Type::Acc, [c], d.times(size, c), near().size(size).coarse()));
                }
            }
            args
        },
        move |dev, v| {
            let a = Conv2dBwdData {
                bias: v.input_if("bias"),
                x: v.input_if("x"),
                mean: v.input_if("mean"),
                rstd: v.input_if("rstd"),
                gamma: v.input_if("gamma"),
                beta: v.input_if("beta"),
                skip: v.input_if("skip"),
                dgamma: v.acc_if("dgamma"),
                dbeta: v.acc_if("dbeta"),
                ..Conv2dBwdData::plain([v.input("dy"), v.input("w")], v.out("dx"), s.stride, s.pad)
            };
            dev.conv2d_bwd_data(S, &a)
        },
    )
}

pub fn bwd_data() -> Vec<Case> {
    let plain = |s, bias| bwd_data_case(s, With { bias, ..With::default() });
    let fused = fused(|s, with| bwd_data_case(s, With { norm: with.norm.or(Some(1)), bias: false, ..with }));
    cases(plain).into_iter().chain(fused).collect()
}

pub fn bwd_data_sample() -> Case {
    let with = With { norm: Some(3), bias: true, residual: true, scale: true, ..With::default() };
    bwd_data_case(SAMPLE, with)
}

fn bwd_weight_case(s: Shape, with: With) -> Case {
    let text = if with.bias { " with bias" } else { "" };
    let of = if with.norm.is_some() { " of a normalised input" } else { "" };
    Case::new(
        s.text() + text + of,
        move |d| {
            let positions = numel(s.y()) / s.outputs;
            let factor = if with.norm.is_some() { 1.0 } else { d.scale };
            let size = d.scale * factor * (positions as f64).sqrt();
            let start = d.times(size.max(d.scale), numel(s.w()));
            let x = d.normal(numel(s.x));
            let mut args = Vec::new();
            let mut dw = sums(d, positions).size(size);
            if let Some(groups) = with.norm {
                args.extend(norm_args(d, &x, s.x, groups));
                dw = dw.coarse().conditioning(CENTRING + positions as f64 / 128.0);
            }
            args.extend([
                act("x", s.x, x),
                act("dy", s.y(), d.normal(numel(s.y()))),
                add("dw", Type::Acc, s.w(), start, dw),
            ]);
            if with.bias {
                let size = d.scale * (positions as f64).sqrt();
                args.push(add("db", Type::Acc, [s.outputs], d.times(size, s.outputs), near().size(size)));
            }
            args
        },
        move |dev, v| {
            let a = Conv2dBwdWeight {
                mean: v.input_if("mean"),
                rstd: v.input_if("rstd"),
                gamma: v.input_if("gamma"),
                beta: v.input_if("beta"),
                ..Conv2dBwdWeight::plain(
                    [v.input("x"), v.input("dy")],
                    v.acc("dw"),
                    v.acc_if("db"),
                    s.stride,
                    s.pad,
                )
            };
            dev.conv2d_bwd_weight(S, &a)
        },
    )
}

pub fn bwd_weight() -> Vec<Case> {
    let plain = |s, bias| bwd_weight_case(s, With { bias, ..With::default() });
    cases(plain).into_iter().chain(fused(bwd_weight_case)).collect()
}

pub fn bwd_weight_sample() -> Case {
    bwd_weight_case(SAMPLE, With { bias: true, norm: Some(3), ..With::default() })
}

/// Outputs and channels of weights.
const UP: [[usize; 2]; 7] = [[1, 1], [3, 5], [32, 32], [33, 40], [40, 31], [0, 4], [4, 0]];

fn up_weights(case: fn([usize; 2]) -> Case) -> Vec<Case> {
    let small = UP.into_iter().map(|s| (Size::Tiny, s));
    let first = [[5, 9], [16, 8]].into_iter().map(|s| (Size::Sanitizer, s));
    let all = first.chain(small).chain([(Size::Full, [512, 256])]);
    all.map(|(size, shape)| case(shape).from(size)).collect()
}

fn up_weights_fwd_case([o, c]: [usize; 2]) -> Case {
    Case::new(
        format!("{o} outputs of {c} channels"),
        move |d| {
            let (w, v) = ([o, 3, 3, c], [c, 4, 4, o]);
            vec![act("w", w, d.normal(numel(w))), out("v", Type::Act, v, near().size(d.scale))]
        },
        |dev, v| dev.upsample2x_weights_fwd(S, &Upsample2xWeightsFwd { w: v.input("w"), v: v.out("v") }),
    )
}

pub fn up_weights_fwd() -> Vec<Case> {
    up_weights(up_weights_fwd_case)
}

pub fn up_weights_fwd_sample() -> Case {
    up_weights_fwd_case([5, 7])
}

fn up_weights_bwd_case([o, c]: [usize; 2]) -> Case {
    Case::new(
        format!("{o} outputs of {c} channels"),
        move |d| {
            let (w, v) = ([o, 3, 3, c], [c, 4, 4, o]);
            let start = d.normal(numel(w));
            let dv = acc("dv", v, d.normal(numel(v)));
            vec![dv, add("dw", Type::Acc, w, start, near().size(d.scale))]
        },
        |dev, v| dev.upsample2x_weights_bwd(S, &Upsample2xWeightsBwd { dv: v.input("dv"), dw: v.acc("dw") }),
    )
}

pub fn up_weights_bwd() -> Vec<Case> {
    up_weights(up_weights_bwd_case)
}

pub fn up_weights_bwd_sample() -> Case {
    up_weights_bwd_case([5, 7])
}
