//! Norms over rows.

use ett::backend::{L2NormBwd, L2NormFwd, LayerNormBwd, LayerNormFwd, RmsNormBwd, RmsNormFwd, Stream};

use super::Size;
use super::case::{Case, Draw, Near, Type, acc, act, add, near, out};

const S: Stream = Stream::COMPUTE;
const EPS: f64 = 1e-6;

/// N and C. Many rows of one or two columns are left out: among them are some whose norm is next to nothing, where
/// every computation in f32 fails.
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

/// All shapes, numbered, so that what is optional may be present by turns.
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
            // The sum, what meets the weight, and the result are rounded.
            let y = near().roundings(if residual { 2.0 } else { 1.5 });
            // Statistics are of the sum as rounded, which the oracle does not round.
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

/// Root mean square, or standard deviation if `centred`, inverted, as the forward leaves it for the backward.
fn statistics(d: &Draw, x: &[f64], c: usize, centred: bool) -> (Vec<f64>, Vec<f64>) {
    let x = d.rounded(x);
    let of = |row: &[f64]| {
        let mean = if centred { row.iter().sum::<f64>() / c as f64 } else { 0.0 };
        let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / c as f64;
        (mean, (var + EPS).sqrt().recip())
    };
    x.chunks(c).map(of).unzip()
}

/// `dx` of a norm: a gradient over the size of the input, both of the run's scale. Rows of one or two values cancel
/// to nothing.
fn dx_of(conditioning: f64) -> Near {
    near().size(1.0).conditioning(conditioning)
}

/// Sums over `n` rows of gradients of the run's scale.
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
                // What multiplies dy was rounded to act in the forward, and is so here.
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

/// `x - mean` loses what the two have in common: a few roundings of x.
const CENTRING: f64 = 4.0;

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
    // The mean of the squares less the square of the mean would be off by 100^2 roundings.
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

/// Every third row is smaller than `least`, if that is not next to nothing, and the last row is 0.
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
    // A number of every type: a raised norm is eps itself, in the oracle too.
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
