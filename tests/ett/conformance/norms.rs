//! Norms over rows, and over pixels per group of channels.

use ett::backend::{
    BatchNormBwd, BatchNormEvalBwd, BatchNormEvalFwd, BatchNormFwd, BatchNormMerge, BatchNormMergedBwd,
    BatchNormRunning, GroupNormBwd, GroupNormFwd, GroupNormStats, L2NormBwd, L2NormFwd, LayerNormBwd,
    LayerNormFwd, RmsNormBwd, RmsNormFwd, Stream,
};

use super::Size;
use super::case::{Case, Draw, Near, Type, acc, act, add, near, out};

const S: Stream = Stream::COMPUTE;
pub const EPS: f64 = 1e-6;

/// N and C. Shapes with many rows of one or two columns are left out: some of their rows have a norm close to zero,
/// for which every computation in f32 fails.
const SMALL: [(usize, usize); 18] = [
    (1, 1),
    (3, 1),
    (1, 31),
    (7, 33),
    (67, 16),
    (2, 63),
    (5, 64),
    (33, 65),
    (4, 127),
    (3, 128),
    (65, 129),
    (2, 255),
    (9, 256),
    (3, 257),
    (129, 24),
    (2, 1009),
    (2, 1536),
    (0, 16),
];
const LARGE: [(usize, usize); 6] =
    [(257, 1536), (4099, 256), (65, 8960), (1031, 127), (33, 8961), (3, 16384)];

/// All shapes, numbered so that optional arguments alternate.
fn shapes() -> impl Iterator<Item = (Size, usize, [usize; 2])> {
    let first = [(Size::Sanitizer, (5, 64)), (Size::Sanitizer, (6, 64))].into_iter();
    let small = SMALL.into_iter().map(|shape| (Size::Tiny, shape));
    let large = LARGE.into_iter().map(|shape| (Size::Full, shape));
    first.chain(small).chain(large).enumerate().map(|(i, (size, (n, c)))| (size, i, [n, c]))
}

fn text([n, c]: [usize; 2], extra: bool, what: &str) -> String {
    format!("[{n}, {c}]{}", if extra { what } else { "" })
}

// ---- RMS norm ------------------------------------------------------------------------------------------

fn rms_fwd_case([n, c]: [usize; 2], residual: bool) -> Case {
    Case::new(
        text([n, c], residual, " with residual"),
        move |d| {
            // The sum, the factor of the weight, and the result are rounded.
            let y = near().roundings(if residual { 2.0 } else { 1.5 });
            // Statistics are those of the rounded sum, which the oracle does not round.
            let rstd = if residual { near().coarse() } else { near() };
            let mut args = vec![act("x", [n, c], d.normal(n * c))];
            if residual {
                args.push(act("residual", [n, c], d.normal(n * c)));
                args.push(out("sum", Type::Act, [n, c], near()));
            }
            args.extend([
                act("w", [c], d.unit(c)),
                out("y", Type::Act, [n, c], y),
                out("rstd", Type::Acc, [n], rstd),
            ]);
            args
        },
        |dev, v| {
            let a = RmsNormFwd {
                x: v.input("x"),
                residual: v.input_if("residual"),
                w: v.input("w"),
                sum: v.out_if("sum"),
                y: v.out("y"),
                rstd: v.out("rstd"),
                eps: EPS,
            };
            dev.rms_norm_fwd(S, &a)
        },
    )
}

pub fn rms_fwd() -> Vec<Case> {
    shapes().map(|(size, i, shape)| rms_fwd_case(shape, i % 2 == 0).from(size)).collect()
}

pub fn rms_fwd_sample() -> Case {
    rms_fwd_case([3, 4], true)
}

/// Means, and inverse root mean squares (standard deviations if `centred`), as the forward kernel computes them for
/// the backward.
fn statistics(d: &Draw, x: &[f64], c: usize, centred: bool) -> (Vec<f64>, Vec<f64>) {
    let x = d.rounded(x);
    let of = |row: &[f64]| {
        let mean = if centred { row.iter().sum::<f64>() / c as f64 } else { 0.0 };
        let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / c as f64;
        (mean, (var + EPS).sqrt().recip())
    };
    x.chunks(c).map(of).unzip()
}

/// `dx` of a norm: a gradient divided by the size of the input, both of the run's scale. Rows of one or two values
/// cancel.
fn dx_of(conditioning: f64) -> Near {
    near().size(1.0).conditioning(conditioning)
}

/// Size of sums over `n` rows of gradients of the run's scale.
fn summed(d: &Draw, n: usize) -> f64 {
    d.scale * (n as f64).sqrt()
}

fn rms_bwd_case([n, c]: [usize; 2], dsum: bool, dw: bool) -> Case {
    Case::new(
        text([n, c], dsum, " with dsum") + if dw { "" } else { " without dw" },
        move |d| {
            let x = d.normal(n * c);
            let rstd = statistics(d, &x, c, false).1;
            let mut args = vec![act("dy", [n, c], d.normal(n * c))];
            if dsum {
                args.push(act("dsum", [n, c], d.normal(n * c)));
            }
            args.extend([
                act("x", [n, c], x),
                act("w", [c], d.unit(c)),
                acc("rstd", [n], rstd),
                out("dx", Type::Act, [n, c], dx_of(2.0)),
            ]);
            if dw {
                // The factor of dy was rounded to act in the forward, and is rounded here as well.
                let size = summed(d, n);
                args.push(add("dw", Type::Acc, [c], d.times(size, c), near().size(size).coarse()));
            }
            args
        },
        |dev, v| {
            let a = RmsNormBwd {
                dy: v.input("dy"),
                dsum: v.input_if("dsum"),
                x: v.input("x"),
                w: v.input("w"),
                rstd: v.input("rstd"),
                dx: v.out("dx"),
                dw: v.acc_if("dw"),
            };
            dev.rms_norm_bwd(S, &a)
        },
    )
}

pub fn rms_bwd() -> Vec<Case> {
    shapes().map(|(size, i, shape)| rms_bwd_case(shape, i % 2 == 0, i % 5 != 1).from(size)).collect()
}

pub fn rms_bwd_sample() -> Case {
    rms_bwd_case([3, 4], true, true)
}

// ---- LayerNorm -----------------------------------------------------------------------------------------

/// `x - mean` cancels: its error is a few roundings of x.
pub const CENTRING: f64 = 4.0;

/// `offset`: the mean of all values, in standard deviations.
fn layer_fwd_case([n, c]: [usize; 2], offset: f64) -> Case {
    Case::new(
        format!("[{n}, {c}]"),
        move |d| {
            let x = d.unit(n * c).iter().map(|v| d.scale * (v + offset)).collect();
            let lost = near().conditioning(CENTRING + offset / 4.0);
            vec![
                act("x", [n, c], x),
                act("w", [c], d.unit(c)),
                act("b", [c], d.unit(c)),
                out("y", Type::Act, [n, c], lost.size(1.0)),
                out("mean", Type::Acc, [n], near().size(d.scale)),
                out("rstd", Type::Acc, [n], lost),
            ]
        },
        |dev, v| {
            let a = LayerNormFwd {
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                y: v.out("y"),
                mean: v.out("mean"),
                rstd: v.out("rstd"),
                eps: EPS,
            };
            dev.layer_norm_fwd(S, &a)
        },
    )
}

pub fn layer_fwd() -> Vec<Case> {
    let all = shapes().map(|(size, _, shape)| layer_fwd_case(shape, 0.0).from(size));
    // The mean of the squares minus the square of the mean would be off by 100^2 roundings.
    let far = layer_fwd_case([5, 384], 100.0).named("mean of 100 standard deviations");
    all.chain([far]).collect()
}

pub fn layer_fwd_sample() -> Case {
    layer_fwd_case([3, 4], 0.0)
}

fn layer_bwd_case([n, c]: [usize; 2], dw: bool, db: bool) -> Case {
    let without =
        |name: &'static str, present| if present { String::new() } else { format!(" without {name}") };
    Case::new(
        format!("[{n}, {c}]") + &without("dw", dw) + &without("db", db),
        move |d| {
            let x = d.normal(n * c);
            let (mean, rstd) = statistics(d, &x, c, true);
            let mut args = vec![
                act("dy", [n, c], d.normal(n * c)),
                act("x", [n, c], x),
                act("w", [c], d.unit(c)),
                acc("mean", [n], mean),
                acc("rstd", [n], rstd),
                out("dx", Type::Act, [n, c], dx_of(CENTRING)),
            ];
            let size = summed(d, n);
            for (name, present) in [("dw", dw), ("db", db)] {
                if present {
                    let near = near().size(size).conditioning(CENTRING);
                    args.push(add(name, Type::Acc, [c], d.times(size, c), near));
                }
            }
            args
        },
        |dev, v| {
            let a = LayerNormBwd {
                dy: v.input("dy"),
                x: v.input("x"),
                w: v.input("w"),
                mean: v.input("mean"),
                rstd: v.input("rstd"),
                dx: v.out("dx"),
                dw: v.acc_if("dw"),
                db: v.acc_if("db"),
            };
            dev.layer_norm_bwd(S, &a)
        },
    )
}

pub fn layer_bwd() -> Vec<Case> {
    shapes().map(|(size, i, shape)| layer_bwd_case(shape, i % 5 != 1, i % 7 != 3).from(size)).collect()
}

pub fn layer_bwd_sample() -> Case {
    layer_bwd_case([3, 4], true, true)
}

// ---- L2 norm -------------------------------------------------------------------------------------------

/// Every third row is shorter than `least`, unless that is close to zero, and the last row is 0.
fn l2_input(d: &Draw, n: usize, c: usize, least: f64) -> Vec<f64> {
    let mut x = d.normal(n * c);
    let size = d.scale * (c as f64).sqrt();
    for (i, row) in x.chunks_mut(c.max(1)).enumerate() {
        if i % 3 == 1 {
            row.iter_mut().for_each(|v| *v *= 0.01 * least / size);
        }
        if i > 0 && i + 1 == n {
            row.fill(0.0);
        }
    }
    x
}

fn l2_fwd_case([n, c]: [usize; 2], eps: f64) -> Case {
    Case::new(
        format!("[{n}, {c}], eps {eps}"),
        move |d| {
            vec![
                act("x", [n, c], l2_input(d, n, c, eps)),
                out("y", Type::Act, [n, c], near()),
                out("norm", Type::Acc, [n], near()),
            ]
        },
        move |dev, v| {
            dev.l2_norm_fwd(S, &L2NormFwd { x: v.input("x"), y: v.out("y"), norm: v.out("norm"), eps })
        },
    )
}

pub fn l2_fwd() -> Vec<Case> {
    shapes().map(|(size, i, shape)| l2_fwd_case(shape, [1e-12, 0.25][i % 2]).from(size)).collect()
}

pub fn l2_fwd_sample() -> Case {
    l2_fwd_case([3, 4], 1e-3)
}

/// `dy` and the result in the activation or the accumulator type.
fn l2_bwd_case([n, c]: [usize; 2], dy: Type, result: Type) -> Case {
    // Exact in every type: the norm of a short row is eps itself, in the oracle too.
    const EPS: f64 = 0.0625;
    let of = |t| if t == Type::Act { "act" } else { "acc" };
    Case::new(
        format!("[{n}, {c}], dy in {}, dx in {}", of(dy), of(result)),
        move |d| {
            let x = l2_input(d, n, c, EPS);
            let rows = d.rounded(&x);
            let norm = rows.chunks(c.max(1)).map(|r| crate::common::norm(r).max(EPS)).collect();
            // dy - y (y . dy) is 0 for a single column.
            let size = d.scale / (d.scale * (c as f64).sqrt()).max(EPS);
            let near = near().size(size).conditioning(4.0);
            let dx = match result {
                Type::Act => out("dx", result, [n, c], near),
                _ => add("dx_acc", result, [n, c], d.times(size, n * c), near),
            };
            vec![
                super::case::input("dy", dy, [n, c], d.normal(n * c)),
                act("x", [n, c], x),
                acc("norm", [n], norm),
                dx,
            ]
        },
        |dev, v| {
            let a = L2NormBwd {
                dy: v.input("dy"),
                x: v.input("x"),
                norm: v.input("norm"),
                dx: v.out_if("dx"),
                dx_acc: v.acc_if("dx_acc"),
                eps: EPS,
            };
            dev.l2_norm_bwd(S, &a)
        },
    )
}

pub fn l2_bwd() -> Vec<Case> {
    const WAYS: [[Type; 2]; 4] =
        [[Type::Act, Type::Act], [Type::Acc, Type::Acc], [Type::Acc, Type::Act], [Type::Act, Type::Acc]];
    let case = |shape, i: usize| l2_bwd_case(shape, WAYS[i % 4][0], WAYS[i % 4][1]);
    let first = (0..4).map(|i| case([6, 64], i).from(Size::Sanitizer));
    first.chain(shapes().skip(2).map(|(size, i, shape)| case(shape, i).from(size))).collect()
}

pub fn l2_bwd_sample() -> Case {
    l2_bwd_case([3, 4], Type::Act, Type::Act)
}

// ---- GroupNorm -----------------------------------------------------------------------------------------

/// B, H, W, C and G, numbered so that SiLU and optional arguments alternate. Groups of a few values are left out,
/// except those of a single one.
fn pictures() -> impl Iterator<Item = (Size, usize, [usize; 5])> {
    // Several chunks per image; the last one is short and leaves threads without a pixel.
    let first = [[1, 20, 15, 64, 16], [2, 3, 5, 16, 4], [2, 3, 5, 13, 1]].map(|s| (Size::Sanitizer, s));
    let small: [[usize; 5]; 10] = [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 8, 8],
        [1, 7, 9, 3, 1],
        [2, 5, 3, 24, 3],
        [1, 4, 4, 33, 11],
        [1, 4, 4, 40, 5],
        [2, 5, 3, 32, 32],
        // More channels than a tile holds.
        [1, 1, 2, 264, 8],
        [0, 4, 4, 8, 2],
        [3, 0, 4, 8, 2],
    ];
    let large: [[usize; 5]; 5] = [
        [8, 64, 64, 128, 32],
        [2, 128, 128, 256, 32],
        [4, 16, 16, 512, 32],
        [3, 31, 33, 96, 32],
        [2, 65, 63, 33, 3],
    ];
    let all = first.into_iter().chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s)));
    all.enumerate().map(|(i, (size, shape))| (size, i, shape))
}

fn picture_text([b, h, w, c, g]: [usize; 5], silu: bool) -> String {
    format!("[{b}, {h}, {w}, {c}] in {g} groups{}", if silu { ", SiLU" } else { "" })
}

/// `offset`: the mean of all values, in standard deviations.
fn group_fwd_case(shape: [usize; 5], silu: bool, offset: f64) -> Case {
    let [b, h, w, c, g] = shape;
    Case::new(
        picture_text(shape, silu),
        move |d| {
            let x = d.unit(b * h * w * c).iter().map(|v| d.scale * (v + offset)).collect();
            let lost = near().conditioning(CENTRING + offset / 4.0);
            // Without pixels, statistics are NaN.
            let of = |near: Near| if h * w == 0 { near.specials() } else { near };
            vec![
                act("x", [b, h, w, c], x),
                act("w", [c], d.unit(c)),
                act("b", [c], d.unit(c)),
                out("y", Type::Act, [b, h, w, c], lost.size(1.0)),
                out("mean", Type::Acc, [b, g], of(near().size(d.scale))).dense(),
                out("rstd", Type::Acc, [b, g], of(lost)).dense(),
            ]
        },
        move |dev, v| {
            let a = GroupNormFwd {
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                y: v.out("y"),
                mean: v.out("mean"),
                rstd: v.out("rstd"),
                eps: EPS,
                silu,
            };
            dev.group_norm_fwd(S, &a)
        },
    )
}

pub fn group_fwd() -> Vec<Case> {
    let all = pictures().map(|(size, i, shape)| group_fwd_case(shape, i % 2 == 0, 0.0).from(size));
    // The mean of the squares minus the square of the mean would be off by 1000^2 roundings.
    let far = |shape| group_fwd_case(shape, false, 1000.0).named("mean of 1000 standard deviations");
    all.chain([far([1, 20, 15, 16, 4]), far([2, 7, 9, 3, 1])]).collect()
}

/// As `group_fwd_case`.
fn group_stats_case(shape: [usize; 5], offset: f64) -> Case {
    let [b, h, w, c, g] = shape;
    Case::new(
        picture_text(shape, false),
        move |d| {
            let x = d.unit(b * h * w * c).iter().map(|v| d.scale * (v + offset)).collect();
            let of = |near: Near| if h * w == 0 { near.specials() } else { near };
            vec![
                act("x", [b, h, w, c], x),
                out("mean", Type::Acc, [b, g], of(near().size(d.scale))).dense(),
                out("rstd", Type::Acc, [b, g], of(near().conditioning(CENTRING + offset / 4.0))).dense(),
            ]
        },
        move |dev, v| {
            let (x, mean, rstd) = (v.input("x"), v.out("mean"), v.out("rstd"));
            dev.group_norm_stats(S, &GroupNormStats { x, mean, rstd, eps: EPS })
        },
    )
}

pub fn group_stats() -> Vec<Case> {
    let all = pictures().map(|(size, _, shape)| group_stats_case(shape, 0.0).from(size));
    let far = |shape| group_stats_case(shape, 1000.0).named("mean of 1000 standard deviations");
    all.chain([far([1, 20, 15, 16, 4]), far([2, 7, 9, 3, 1])]).collect()
}

pub fn group_stats_sample() -> Case {
    group_stats_case([2, 5, 7, 6, 3], 0.0)
}

pub fn group_fwd_sample() -> Case {
    group_fwd_case([2, 5, 7, 6, 3], true, 0.0)
}

/// Means and inverse standard deviations `[B, G]`, as the forward kernel computes them.
pub fn group_statistics(d: &Draw, x: &[f64], [b, h, w, c, g]: [usize; 5]) -> (Vec<f64>, Vec<f64>) {
    let x = d.rounded(x);
    let (pixels, width) = (h * w, c / g);
    let of = |i: usize| {
        let (image, group) = (i / g, i % g);
        let at = |p: usize, k: usize| x[(image * pixels + p) * c + group * width + k];
        let values: Vec<f64> = (0..pixels).flat_map(|p| (0..width).map(move |k| at(p, k))).collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let var = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
        (mean, (var + EPS).sqrt().recip())
    };
    (0..b * g).map(of).unzip()
}

fn group_bwd_case(shape: [usize; 5], silu: bool, dw: bool, db: bool) -> Case {
    let [b, h, w, c, g] = shape;
    Case::new(
        picture_text(shape, silu) + if dw { "" } else { " without dw" } + if db { "" } else { " without db" },
        move |d| {
            let n = b * h * w;
            let x = d.normal(n * c);
            let (mean, rstd) = group_statistics(d, &x, shape);
            // For a group of one value, only the rounding of terms of this size remains.
            let terms = rstd.iter().map(|r| d.scale * r).fold(1.0, f64::max);
            let mut args = vec![
                act("dy", [b, h, w, c], d.normal(n * c)),
                act("x", [b, h, w, c], x),
                act("w", [c], d.unit(c)),
                act("b", [c], d.unit(c)),
                acc("mean", [b, g], mean).dense(),
                acc("rstd", [b, g], rstd).dense(),
                out("dx", Type::Act, [b, h, w, c], dx_of(CENTRING).size(terms)),
            ];
            args.extend(channel_gradients(d, n, c, dw, db));
            args
        },
        move |dev, v| {
            let a = GroupNormBwd {
                dy: v.input("dy"),
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                mean: v.input("mean"),
                rstd: v.input("rstd"),
                dx: v.out("dx"),
                dw: v.acc_if("dw"),
                db: v.acc_if("db"),
                silu,
            };
            dev.group_norm_bwd(S, &a)
        },
    )
}

/// `dw` and `db`, sums over `n` rows, if requested.
fn channel_gradients(
    d: &Draw,
    n: usize,
    c: usize,
    dw: bool,
    db: bool,
) -> impl Iterator<Item = super::case::Arg> {
    let size = summed(d, n).max(d.scale);
    let gradient = |(name, present): (&'static str, bool)| {
        present.then(|| add(name, Type::Acc, [c], d.times(size, c), near().size(size).conditioning(CENTRING)))
    };
    [("dw", dw), ("db", db)].map(gradient).into_iter().flatten()
}

pub fn group_bwd() -> Vec<Case> {
    let case = |(size, i, shape): (Size, usize, [usize; 5])| {
        group_bwd_case(shape, i % 2 == 0, i % 5 != 1, i % 7 != 3).from(size)
    };
    pictures().map(case).collect()
}

pub fn group_bwd_sample() -> Case {
    group_bwd_case([2, 5, 7, 6, 3], true, true, true)
}

// ---- BatchNorm -----------------------------------------------------------------------------------------

const BATCH_EPS: f64 = 1e-5;

/// N and C, numbered. Few rows are left out, except one and none.
fn batches() -> impl Iterator<Item = (Size, usize, [usize; 2])> {
    let first = [[300, 64], [33, 24], [33, 13]].map(|s| (Size::Sanitizer, s));
    let small: [[usize; 2]; 7] = [[1, 8], [9, 3], [40, 16], [17, 33], [64, 1], [3, 264], [0, 8]];
    let large: [[usize; 2]; 5] = [[8192, 64], [65_536, 128], [1000, 512], [4097, 33], [115_200, 256]];
    let all = first.into_iter().chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s)));
    all.enumerate().map(|(i, (size, shape))| (size, i, shape))
}

/// With and without LeakyReLU alternately.
fn slope(i: usize) -> f64 {
    [0.2, 1.0][i % 2]
}

fn batch_fwd_case([n, c]: [usize; 2], slope: f64, offset: f64) -> Case {
    Case::new(
        format!("[{n}, {c}], slope {slope}"),
        move |d| {
            let x = d.unit(n * c).iter().map(|v| d.scale * (v + offset)).collect();
            // Three rows may have almost no variance.
            let lost = near().conditioning(CENTRING + offset / 4.0 + if n == 3 { 400.0 } else { 0.0 });
            let of = |near: Near| if n == 0 { near.specials() } else { near };
            vec![
                act("x", [n, c], x),
                act("w", [c], d.unit(c)),
                act("b", [c], d.unit(c)),
                out("y", Type::Act, [n, c], lost.size(1.0)),
                out("mean", Type::Acc, [c], of(near().size(d.scale))),
                out("var", Type::Acc, [c], of(lost.size(d.scale * d.scale))),
            ]
        },
        move |dev, v| {
            let a = BatchNormFwd {
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                y: v.out("y"),
                mean: v.out("mean"),
                var: v.out("var"),
                eps: BATCH_EPS,
                slope,
            };
            dev.batch_norm_fwd(S, &a)
        },
    )
}

pub fn batch_fwd() -> Vec<Case> {
    let all = batches().map(|(size, i, shape)| batch_fwd_case(shape, slope(i), 0.0).from(size));
    let far = batch_fwd_case([300, 8], 1.0, 1000.0).named("mean of 1000 standard deviations");
    all.chain([far]).collect()
}

pub fn batch_fwd_sample() -> Case {
    batch_fwd_case([3, 4], 0.2, 0.0)
}

/// Inputs of both backward kernels: with the statistics of the batch, or with other statistics if `given`.
fn batch_bwd_args(d: &Draw, [n, c]: [usize; 2], given: bool, dw: bool, db: bool) -> Vec<super::case::Arg> {
    let x = d.normal(n * c);
    let rows = d.rounded(&x);
    let of = |k: usize| {
        let mean = (0..n).map(|i| rows[i * c + k]).sum::<f64>() / n as f64;
        (mean, (0..n).map(|i| (rows[i * c + k] - mean).powi(2)).sum::<f64>() / n as f64)
    };
    let (mean, var) = match given || n == 0 {
        true => given_statistics(d, c),
        false => (0..c).map(of).unzip(),
    };
    let lost = if n == 3 { 400.0 } else { 0.0 };
    // For a single row, only the rounding of terms of this size remains.
    let terms = if n == 1 { d.scale / BATCH_EPS.sqrt() } else { 0.0 };
    let (w, b) = (d.unit(c), d.unit(c));
    let mut dy = d.normal(n * c);
    // Rounding decides on which side of the kink a value near it lies: it gets no gradient.
    let affine: Vec<(f64, f64)> = (d.rounded(&w).into_iter().zip(&var))
        .map(|(w, var)| w / (var + BATCH_EPS).sqrt())
        .zip(d.rounded(&b))
        .collect();
    for (i, dy) in dy.iter_mut().enumerate() {
        let (scale, b) = affine[i % c];
        let normed = (rows[i] - mean[i % c]) * scale;
        if (normed + b).abs() < 1e-4 * (normed.abs() + b.abs()) {
            *dy = 0.0;
        }
    }
    let mut args = vec![
        act("dy", [n, c], dy),
        act("x", [n, c], x),
        act("w", [c], w),
        act("b", [c], b),
        acc("mean", [c], mean),
        acc("var", [c], var),
        out("dx", Type::Act, [n, c], dx_of(CENTRING + lost).size(terms)),
    ];
    args.extend(channel_gradients(d, n, c, dw, db));
    args
}

/// Means and variances of the run's scale, none of them small.
fn given_statistics(d: &Draw, c: usize) -> (Vec<f64>, Vec<f64>) {
    (d.normal(c), d.unit(c).iter().map(|v| d.scale * d.scale * (0.5 + v.abs())).collect())
}

fn batch_bwd_case(shape: [usize; 2], slope: f64, dw: bool, db: bool) -> Case {
    let [n, c] = shape;
    Case::new(
        format!("[{n}, {c}], slope {slope}, dw {dw}, db {db}"),
        move |d| batch_bwd_args(d, shape, false, dw, db),
        move |dev, v| {
            let a = BatchNormBwd {
                dy: v.input("dy"),
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                mean: v.input("mean"),
                var: v.input("var"),
                dx: v.out("dx"),
                dw: v.acc_if("dw"),
                db: v.acc_if("db"),
                eps: BATCH_EPS,
                slope,
            };
            dev.batch_norm_bwd(S, &a)
        },
    )
}

pub fn batch_bwd() -> Vec<Case> {
    let case = |(size, i, shape)| batch_bwd_case(shape, slope(i), i % 5 != 1, i % 7 != 3).from(size);
    batches().map(case).collect()
}

pub fn batch_bwd_sample() -> Case {
    batch_bwd_case([3, 4], 0.2, true, true)
}

fn batch_eval_fwd_case([n, c]: [usize; 2], slope: f64) -> Case {
    Case::new(
        format!("[{n}, {c}], slope {slope}"),
        move |d| {
            let (mean, var) = given_statistics(d, c);
            vec![
                act("x", [n, c], d.normal(n * c)),
                act("w", [c], d.unit(c)),
                act("b", [c], d.unit(c)),
                acc("mean", [c], mean),
                acc("var", [c], var),
                out("y", Type::Act, [n, c], near().size(1.0).conditioning(CENTRING)),
            ]
        },
        move |dev, v| {
            let a = BatchNormEvalFwd {
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                mean: v.input("mean"),
                var: v.input("var"),
                y: v.out("y"),
                eps: BATCH_EPS,
                slope,
            };
            dev.batch_norm_eval_fwd(S, &a)
        },
    )
}

pub fn batch_eval_fwd() -> Vec<Case> {
    batches().map(|(size, i, shape)| batch_eval_fwd_case(shape, slope(i)).from(size)).collect()
}

pub fn batch_eval_fwd_sample() -> Case {
    batch_eval_fwd_case([3, 4], 0.2)
}

fn batch_eval_bwd_case(shape: [usize; 2], slope: f64, dw: bool, db: bool) -> Case {
    let [n, c] = shape;
    Case::new(
        format!("[{n}, {c}], slope {slope}, dw {dw}, db {db}"),
        move |d| batch_bwd_args(d, shape, true, dw, db),
        move |dev, v| {
            let a = BatchNormEvalBwd {
                dy: v.input("dy"),
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                mean: v.input("mean"),
                var: v.input("var"),
                dx: v.out("dx"),
                dw: v.acc_if("dw"),
                db: v.acc_if("db"),
                eps: BATCH_EPS,
                slope,
            };
            dev.batch_norm_eval_bwd(S, &a)
        },
    )
}

pub fn batch_eval_bwd() -> Vec<Case> {
    // Sometimes without both, in which case the sums are not computed.
    let case = |(size, i, shape)| batch_eval_bwd_case(shape, slope(i), i % 3 != 1, i % 6 != 1).from(size);
    batches().map(case).collect()
}

pub fn batch_eval_bwd_sample() -> Case {
    batch_eval_bwd_case([3, 4], 0.2, true, true)
}

fn batch_merge_case([r, c]: [usize; 2]) -> Case {
    Case::new(
        format!("[{r}, {c}]"),
        move |d| {
            let of = |near: Near| if r == 0 { near.specials() } else { near };
            let vars = d.unit(r * c).iter().map(|v| d.scale * d.scale * (0.5 + v.abs())).collect();
            vec![
                acc("means", [r, c], d.normal(r * c)),
                acc("vars", [r, c], vars),
                out("mean", Type::Acc, [c], of(near().size(d.scale))),
                out("var", Type::Acc, [c], of(near())),
            ]
        },
        |dev, v| {
            let a = BatchNormMerge {
                means: v.input("means"),
                vars: v.input("vars"),
                mean: v.out("mean"),
                var: v.out("var"),
            };
            dev.batch_norm_merge(S, &a)
        },
    )
}

pub fn batch_merge() -> Vec<Case> {
    let sizes = [
        (Size::Sanitizer, [2, 20]),
        (Size::Tiny, [1, 7]),
        (Size::Tiny, [3, 300]),
        (Size::Tiny, [0, 5]),
        (Size::Tiny, [4, 0]),
        (Size::Full, [64, 4097]),
    ];
    sizes.map(|(size, shape)| batch_merge_case(shape).from(size)).into()
}

pub fn batch_merge_sample() -> Case {
    batch_merge_case([3, 4])
}

fn batch_merged_bwd_case(shape: [usize; 2], slope: f64) -> Case {
    let [n, c] = shape;
    let rows = 3 * n + 1;
    Case::new(
        format!("[{n}, {c}] of {rows} rows, slope {slope}"),
        move |d| {
            let mut args = batch_bwd_args(d, shape, true, false, false);
            // Large enough that a mistake in them shows.
            args.push(acc("sums", [2, c], d.times(d.scale * rows as f64, 2 * c)).dense());
            args
        },
        move |dev, v| {
            let a = BatchNormMergedBwd {
                dy: v.input("dy"),
                x: v.input("x"),
                w: v.input("w"),
                b: v.input("b"),
                mean: v.input("mean"),
                var: v.input("var"),
                sums: v.input("sums"),
                dx: v.out("dx"),
                rows,
                eps: BATCH_EPS,
                slope,
            };
            dev.batch_norm_merged_bwd(S, &a)
        },
    )
}

pub fn batch_merged_bwd() -> Vec<Case> {
    batches().map(|(size, i, shape)| batch_merged_bwd_case(shape, slope(i)).from(size)).collect()
}

pub fn batch_merged_bwd_sample() -> Case {
    batch_merged_bwd_case([3, 4], 0.2)
}

fn batch_running_case(c: usize, rows: usize) -> Case {
    const MOMENTUM: f64 = 0.1;
    Case::new(
        format!("[{c}], {rows} rows"),
        move |d| {
            let (mut mean, mut var) = given_statistics(d, c);
            // Statistics of these channels must not change.
            for (i, bad) in [(3, f64::NAN), (5, f64::INFINITY), (6, f64::NEG_INFINITY)] {
                if i < c {
                    (mean[i], var[c - 1 - i]) = (bad, bad);
                }
            }
            vec![
                acc("mean", [c], mean),
                acc("var", [c], var),
                add("running_mean", Type::Acc, [c], d.normal(c), near().size(d.scale)),
                add("running_var", Type::Acc, [c], given_statistics(d, c).1, near()),
            ]
        },
        move |dev, v| {
            let a = BatchNormRunning {
                mean: v.input("mean"),
                var: v.input("var"),
                running_mean: v.acc("running_mean"),
                running_var: v.acc("running_var"),
                rows,
                momentum: MOMENTUM,
            };
            dev.batch_norm_running(S, &a)
        },
    )
}

pub fn batch_running() -> Vec<Case> {
    let sizes = [
        (Size::Sanitizer, 20, 9),
        (Size::Tiny, 1, 1),
        (Size::Tiny, 64, 1000),
        (Size::Tiny, 300, 2),
        (Size::Tiny, 0, 3),
        (Size::Full, 4097, 115_200),
    ];
    sizes.map(|(size, c, rows)| batch_running_case(c, rows).from(size)).into()
}

pub fn batch_running_sample() -> Case {
    batch_running_case(4, 3)
}
