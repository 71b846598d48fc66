//! The nearest code.

use ett::backend::{DType, Kernels, Matmul, Metric, Nearest, Precision, Stream};
use ett::compare::{choices, indices};
use ett::error;

use super::Size;
use super::case::{Case, Draw, Judge, ONCE, Seen, Type, Views, act, add, near, out};
use super::place::compute;

const S: Stream = Stream::COMPUTE;

/// M, K and D.
type Shape = [usize; 3];

fn case(shape: Shape, metric: Metric, judge: Judge, data: fn(&Draw, Shape) -> [Vec<f64>; 2]) -> Case {
    let [m, k, dim] = shape;
    Case::new(
        format!("[{m}, {dim}] among [{k}, {dim}], {metric:?}"),
        move |d| {
            let [z, e] = data(d, shape);
            let idx = out("idx", Type::Is(DType::I32), [m], judge.clone());
            let mut args = vec![act("z", [m, dim], z), act("e", [k, dim], e), idx];
            // Also without the score and the count, for which some implementations finish in another way.
            if m % 3 != 0 {
                args.push(out(
                    "score",
                    Type::Acc,
                    [m],
                    near().conditioning(10.0).size(d.scale * dim as f64).specials(),
                ));
            }
            if !m.is_multiple_of(2) {
                args.push(add("bad", Type::Acc, [1], vec![3.0], Judge::Exact));
            }
            args
        },
        move |dev, v| {
            let (z, e, idx) = (v.input("z"), v.input("e"), v.out("idx"));
            let (score, bad) = (v.out_if("score"), v.acc_if("bad"));
            dev.nearest(S, &Nearest { z, e, idx, score, bad, metric })
        },
    )
}

// ---- judges --------------------------------------------------------------------------------------------

/// The oracle's choice: for data on which rounding cannot change it.
pub(super) fn equal(seen: &Seen) -> Result<(), String> {
    let int = |v: &[f64]| v.iter().map(|&v| v as i32).collect::<Vec<_>>();
    indices(seen.what, &int(seen.got), &int(seen.want))
}

/// Relative to |z| |e|: a sum of a few hundred products in f32 has a smaller error.
const SLACK: f64 = 2e-6;
/// The same for sums of split products, which a GPU may use for f32 (kernels/codebook/nearest.cu).
const SPLIT_SLACK: f64 = 2e-5;

pub(super) fn by_dot(seen: &Seen) -> Result<(), String> {
    by_score(seen, Metric::Dot, SLACK)
}

fn nearest_by_dot(seen: &Seen) -> Result<(), String> {
    by_score(seen, Metric::Dot, slack(seen.prec))
}

fn nearest_by_distance(seen: &Seen) -> Result<(), String> {
    by_score(seen, Metric::L2, slack(seen.prec))
}

fn slack(prec: Precision) -> f64 {
    if prec.act == DType::F32 { SPLIT_SLACK } else { SLACK }
}

/// A choice whose exact score is the best, up to the rounding of scores in f32.
fn by_score(seen: &Seen, metric: Metric, slack: f64) -> Result<(), String> {
    let (z, e) = (seen.input("z"), seen.input("e"));
    let (k, dim) = (e.dims.rows(), z.dims.cols());
    let (z, e) = (z.values().expect("an input"), e.values().expect("an input"));
    let half = |row: &[f64]| 0.5 * row.iter().map(|v| v * v).sum::<f64>();
    let halves: Vec<f64> = e.chunks(dim).map(half).collect();
    let longest = (2.0 * halves.iter().copied().fold(0.0, f64::max)).sqrt();
    // A few rows at a time, because all scores may take a lot of memory.
    let rows = ((16 << 20) / k).max(1);
    for (i, (z, got)) in z.chunks(rows * dim).zip(seen.got.chunks(rows)).enumerate() {
        let mut scores = scores(seen.oracle, z, e, dim).map_err(|e| format!("{}: {e}", seen.what))?;
        for (r, row) in scores.chunks_mut(k).enumerate() {
            let mut size = (2.0 * half(&z[r * dim..][..dim])).sqrt() * longest;
            if metric == Metric::L2 {
                row.iter_mut().zip(&halves).for_each(|(s, h)| *s -= h);
                size += 0.5 * longest * longest;
            }
            let what = format!("{}, token {}", seen.what, i * rows + r);
            choices(&what, &[got[r] as i32], row, k, slack * size)?;
        }
    }
    Ok(())
}

/// `z e^T` in f64.
fn scores(oracle: &dyn Kernels, z: &[f64], e: &[f64], dim: usize) -> error::Result<Vec<f64>> {
    let (m, k) = (z.len() / dim, e.len() / dim);
    let args = [
        act("a", [m, dim], z.to_vec()),
        act("b", [k, dim], e.to_vec()),
        out("y", Type::Act, [m, k], Judge::Exact),
    ];
    let product = |dev: &dyn Kernels, v: &Views| {
        let (a, b, y) = (v.input("a"), v.input("b"), v.out("y"));
        dev.matmul(S, &Matmul { a, b, ta: false, tb: true, bias: None, y })
    };
    Ok(compute(oracle, Precision::F64, &args, &product)?.swap_remove(0))
}

// ---- data ----------------------------------------------------------------------------------------------

/// Random tokens and codes.
fn random(d: &Draw, [m, k, dim]: Shape) -> [Vec<f64>; 2] {
    [d.normal(m * dim), d.normal(k * dim)]
}

/// Codes of length 1 in many dimensions, and tokens close to some of them: every other code is far away.
fn separated(d: &Draw, [m, k, dim]: Shape) -> [Vec<f64>; 2] {
    let mut e = d.unit(k * dim);
    for code in e.chunks_mut(dim) {
        let length = crate::common::norm(code);
        code.iter_mut().for_each(|v| *v /= length);
    }
    let mut z = d.times(0.2 / (dim as f64).sqrt(), m * dim);
    for ((z, j), i) in z.chunks_mut(dim).zip(d.ids(m, k)).zip(0..) {
        // The last code and the first are always among them.
        let j = if i == 0 {
            k - 1
        } else if i == 1 {
            0
        } else {
            j as usize
        };
        z.iter_mut().zip(&e[j * dim..]).for_each(|(z, e)| *z += e);
    }
    [z, e]
}

/// Every code is its own nearest.
fn itself(d: &Draw, shape @ [m, k, _]: Shape) -> [Vec<f64>; 2] {
    assert_eq!(m, k);
    let [_, e] = separated(d, shape);
    [e.clone(), e]
}

fn is_itself(seen: &Seen) -> Result<(), String> {
    let want: Vec<i32> = (0..seen.got.len() as i32).collect();
    let got: Vec<i32> = seen.got.iter().map(|&v| v as i32).collect();
    indices(seen.what, &got, &want)
}

/// One code at many places of the codebook, of which the first is right; other codes occur twice.
fn duplicates(d: &Draw, shape @ [m, k, dim]: Shape) -> [Vec<f64>; 2] {
    let [_, mut e] = separated(d, shape);
    let first = k / 7;
    for j in (first..k).filter(|j| j % 5 == 0 || *j == k - 1) {
        e.copy_within(first * dim..(first + 1) * dim, j * dim);
    }
    for j in (1..k).filter(|j| j % 31 == 7) {
        e.copy_within((j - 1) * dim..j * dim, j * dim);
    }
    // Tokens are codes: some of those that occur twice, and some between them.
    let z = (0..m).flat_map(|i| e[(i * 3 % k) * dim..][..dim].to_vec()).collect();
    [z, e]
}

/// A token of NaN gets code 0, as does a token with a single NaN; a code with NaN is never chosen.
fn with_nan(d: &Draw, shape @ [m, k, dim]: Shape) -> [Vec<f64>; 2] {
    let [mut z, mut e] = separated(d, shape);
    // This token is nearest to the code that becomes NaN, the next one to that code's neighbour.
    z[2 * dim..3 * dim].copy_from_slice(&e[(k - 2) * dim..(k - 1) * dim]);
    e[(k - 2) * dim + dim / 2] = f64::NAN;
    e[dim..2 * dim].fill(f64::NAN);
    z[(m - 1) * dim..].fill(f64::NAN);
    z[(m / 2) * dim + dim - 1] = f64::NAN;
    [z, e]
}

/// No code has a score: every token gets 0.
fn only_nan(d: &Draw, [m, k, dim]: Shape) -> [Vec<f64>; 2] {
    [d.unit(m * dim), vec![f64::NAN; k * dim]]
}

/// All scores are equal, among them -0 and 0.
fn all_equal(_: &Draw, [m, k, dim]: Shape) -> [Vec<f64>; 2] {
    let sign = |i: usize| if i.is_multiple_of(3) { -0.0 } else { 0.0 };
    [vec![1.0; m * dim], (0..k * dim).map(sign).collect()]
}

// ---- cases ---------------------------------------------------------------------------------------------

pub fn nearest() -> Vec<Case> {
    let metrics = [(Metric::Dot, nearest_by_dot as fn(&Seen) -> _), (Metric::L2, nearest_by_distance)];
    let random = |shape| metrics.map(|(metric, judge)| case(shape, metric, Judge::By(judge), random));
    let named = |name: &str, shape, data, judge: fn(&Seen) -> _| {
        [Metric::Dot, Metric::L2].map(|metric| case(shape, metric, Judge::By(judge), data).named(name))
    };
    let first = random([20, 40, 32]).into_iter().chain(random([3, 9, 64])).map(|c| c.from(Size::Sanitizer));
    let small: [Shape; 13] = [
        [1, 1, 1],
        [7, 1, 8],
        [3, 5, 7],
        [31, 129, 16],
        [33, 127, 64],
        [63, 65, 3],
        [64, 64, 128],
        [65, 63, 256],
        [127, 33, 40],
        [129, 257, 8],
        [2, 1031, 24],
        [128, 128, 32],
        [0, 5, 8],
    ];
    let large: [Shape; 4] = [[1031, 8192, 256], [257, 131_072, 256], [64, 131_073, 32], [4099, 1024, 64]];
    let mut all: Vec<Case> = first.collect();
    all.extend(small.into_iter().flat_map(random));
    all.extend(large.into_iter().flat_map(random).map(|c| c.from(Size::Full)));
    // Needs indices of 17 bits; the last code has to be found.
    all.extend(named("K = 131072, well separated", [3, 131_072, 64], separated, equal).into_iter().take(1));
    let separated_at = |shape| named("well separated", shape, separated, equal);
    all.extend([[65, 257, 64], [129, 1031, 96], [33, 300, 256]].into_iter().flat_map(separated_at));
    all.extend(separated_at([2048, 16_384, 256]).map(|c| c.from(Size::Full).runs(ONCE)));
    all.extend(named("each finds itself", [263, 263, 64], itself, is_itself));
    all.extend(
        named("each finds itself", [4096, 4096, 256], itself, is_itself)
            .map(|c| c.from(Size::Full).runs(ONCE)),
    );
    let many: [Shape; 3] = [[2, 131_071, 8], [3, 131_072, 8], [1, 131_073, 8]];
    let wide: [Shape; 3] = [[4, 9, 264], [3, 7, 504], [5, 6, 512]];
    all.extend(many.into_iter().flat_map(random).map(|c| c.named("edge")));
    all.extend(wide.into_iter().flat_map(random).map(|c| c.named("edge").on_shim()));
    all.extend(named("duplicates", [130, 390, 64], duplicates, equal));
    all.extend(named("NaN", [67, 140, 64], with_nan, equal));
    all.extend(named("only NaN", [5, 70, 32], only_nan, equal));
    all.extend(named("zeros of both signs", [5, 200, 16], all_equal, equal));
    all
}

pub fn nearest_sample() -> Case {
    case([3, 4, 8], Metric::Dot, Judge::By(nearest_by_dot), random)
}
