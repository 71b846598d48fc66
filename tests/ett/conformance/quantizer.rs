//! The quantizers: statistics, values and gradients of IBQ, values and gradients of plain VQ.

use std::collections::HashMap;

use ett::backend::{DType, IbqBwd, IbqCols, IbqLosses, IbqRows, Stream, VqBwd, VqLosses};

use super::Size;
use super::case::{Arg, Case, Draw, Judge, Near, Type, acc, act, add, input, int, near, out};
use super::codebook::{by_dot, equal};

const S: Stream = Stream::COMPUTE;
const EPS: f64 = 1e-5;
const BETA_COMMIT: f64 = 1.0;
const BETA_CODE: f64 = 0.25;

/// M, K and D.
type Shape = [usize; 3];

/// Tokens and codes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Data {
    /// Normal scores, multiplied by the scale of the run.
    Random,
    /// Tokens point at codes, several at the same ones: the best code has nearly all of the probability.
    Sure,
    /// The same codes in every part of the codebook; tokens are codes.
    Duplicates,
    /// All scores are zero.
    Equal,
    /// Tokens of size 1e-4: all codes have nearly the same score.
    Flat,
    /// Tokens and codes of length 1, as with `l2norm`.
    Unit,
    /// One code is a thousand times longer than the others.
    Huge,
    /// Tokens and codes with NaN; for the values only, not the gradients.
    Nan,
}

#[derive(Clone, Copy)]
struct Problem {
    shape: Shape,
    data: Data,
    temperature: f64,
    entropies: bool,
    de: bool,
}

fn problem(shape: Shape) -> Problem {
    Problem { shape, data: Data::Random, temperature: 0.4, entropies: true, de: true }
}

/// Statistics of a forward kernel, by name.
type Stats = HashMap<&'static str, Vec<f64>>;

impl Problem {
    fn text(&self) -> String {
        let [m, k, dim] = self.shape;
        let entropies =
            if self.entropies { format!("T {}", self.temperature) } else { "no entropies".into() };
        let de = if self.de { "" } else { ", without de" };
        format!("[{m}, {dim}] among [{k}, {dim}], {entropies}{de}")
    }

    /// z and e.
    fn operands(&self, d: &Draw) -> [Vec<f64>; 2] {
        let [m, k, dim] = self.shape;
        let mut e = d.times((dim as f64).powf(-0.5), k * dim);
        let mut z = d.times(d.scale, m * dim);
        let code = |e: &[f64], j: usize| e[j * dim..(j + 1) * dim].to_vec();
        match self.data {
            Data::Random => {}
            Data::Equal => z.fill(0.0),
            Data::Flat => z.iter_mut().for_each(|z| *z *= 1e-4),
            Data::Unit => {
                for row in z.chunks_mut(dim).chain(e.chunks_mut(dim)) {
                    let length = crate::common::norm(row);
                    row.iter_mut().for_each(|v| *v /= length);
                }
            }
            Data::Sure => {
                for (i, z) in z.chunks_mut(dim).enumerate() {
                    let at = code(&e, i * i % 7 * k / 7);
                    z.iter_mut().zip(at).for_each(|(z, e)| *z = 0.1 * *z + 30.0 * e);
                }
            }
            Data::Duplicates => {
                let first = k / 7;
                for j in (first..k).step_by(5) {
                    e.copy_within(first * dim..(first + 1) * dim, j * dim);
                }
                for (i, z) in z.chunks_mut(dim).enumerate() {
                    z.copy_from_slice(&code(&e, i * 3 % k));
                }
            }
            Data::Huge => e[k / 2 * dim..(k / 2 + 1) * dim].iter_mut().for_each(|e| *e *= 1000.0),
            Data::Nan => {
                e[k / 3 * dim] = f64::NAN;
                z[(m / 2) * dim..(m / 2 + 1) * dim].fill(f64::NAN);
            }
        }
        [z, e]
    }

    fn inputs(&self, d: &Draw) -> Vec<Arg> {
        let [m, k, dim] = self.shape;
        let [z, e] = self.operands(d);
        vec![act("z", [m, dim], z), act("e", [k, dim], e)]
    }

    /// A few roundings of a score, divided by the temperature, are a relative error of an exponential.
    fn near(&self, d: &Draw) -> Near {
        let size = match self.data {
            Data::Random | Data::Nan | Data::Equal | Data::Flat => d.scale,
            Data::Unit => 1.0,
            Data::Sure | Data::Duplicates => 30.0,
            Data::Huge => 1000.0 * d.scale,
        };
        near().conditioning(2.0 + size / if self.entropies { self.temperature } else { 1.0 })
    }

    // ---- statistics ------------------------------------------------------------------------------------

    fn rows(self) -> Case {
        let [m, k, _] = self.shape;
        Case::new(
            self.text(),
            move |d| {
                let mut args = self.inputs(d);
                let near = self.near(d).size(1e-3);
                // Rounding cannot change the choice among equal codes.
                let judge = match self.data {
                    Data::Random | Data::Sure | Data::Huge | Data::Flat | Data::Unit => Judge::By(by_dot),
                    Data::Duplicates | Data::Equal | Data::Nan => Judge::By(equal),
                };
                args.push(out("idx", Type::Is(DType::I32), [m], judge));
                // The score of a token without a number is minus infinity.
                args.push(out("smax", Type::Acc, [m], near.size(d.scale).specials()));
                args.push(out("rest_p", Type::Acc, [m], near));
                if self.entropies {
                    args.push(out("rest_q", Type::Acc, [m], near));
                    args.push(out("xbar", Type::Acc, [m], near.size((k as f64).ln().max(1.0) * 0.1)));
                }
                args.push(add("bad", Type::Acc, [1], vec![3.0], Judge::Exact));
                args
            },
            move |dev, v| {
                let a = IbqRows {
                    z: v.input("z"),
                    e: v.input("e"),
                    idx: v.out("idx"),
                    smax: v.out("smax"),
                    rest_p: v.out("rest_p"),
                    rest_q: v.out_if("rest_q"),
                    xbar: v.out_if("xbar"),
                    bad: v.acc("bad"),
                    temperature: self.temperature,
                };
                dev.ibq_rows(S, &a)
            },
        )
    }

    fn cols(self) -> Case {
        let [m, k, _] = self.shape;
        Case::new(
            self.text(),
            move |d| {
                let mut args = self.inputs(d);
                let stats = self.stats(d, &args);
                args.push(self.idx(&stats));
                args.extend(["smax", "rest_q"].map(|name| acc(name, [m], stats[name].clone())));
                let near = self.near(d).size(0.1 * m as f64 / k as f64);
                args.push(out("col", Type::Acc, [k], near));
                args
            },
            move |dev, v| {
                let a = IbqCols {
                    z: v.input("z"),
                    e: v.input("e"),
                    idx: v.input("idx"),
                    smax: v.input("smax"),
                    rest_q: v.input("rest_q"),
                    col: v.out("col"),
                    temperature: self.temperature,
                };
                dev.ibq_cols(S, &a)
            },
        )
    }

    /// The oracle's statistics of the inputs as rounded in the run.
    fn stats(&self, d: &Draw, inputs: &[Arg]) -> Stats {
        let [m, k, _] = self.shape;
        let mut args = inputs[..2].to_vec();
        args.push(out("idx", Type::Is(DType::I32), [m], Judge::Exact));
        let names: &[&'static str] =
            if self.entropies { &["smax", "rest_p", "rest_q", "xbar"] } else { &["smax", "rest_p"] };
        args.extend(names.iter().map(|&name| out(name, Type::Acc, [m], Judge::Exact)));
        args.push(add("bad", Type::Acc, [1], vec![0.0], Judge::Exact));
        let mut stats = d.forward(args, self.rows().call);
        if self.entropies {
            let mut args = inputs[..2].to_vec();
            args.push(self.idx(&stats));
            args.extend(["smax", "rest_q"].map(|name| acc(name, [m], stats[name].clone())));
            args.push(out("col", Type::Acc, [k], Judge::Exact));
            stats.extend(d.forward(args, self.cols().call));
        }
        stats
    }

    // ---- values ----------------------------------------------------------------------------------------

    fn losses(self) -> Case {
        let [m, k, dim] = self.shape;
        Case::new(
            self.text(),
            move |d| {
                let mut args = self.inputs(d);
                let stats = self.stats(d, &args);
                args.push(self.idx(&stats));
                if self.entropies {
                    args.extend(["rest_q", "xbar"].map(|name| acc(name, [m], stats[name].clone())));
                    args.push(acc("col", [k], stats["col"].clone()));
                }
                args.push(acc("inv_count", [1], vec![1.0 / m.max(1) as f64]));
                args.push(out("zq", Type::Act, [m, dim], Judge::Exact));
                // The CPU adds thousands of squares one by one in f32.
                let near = near().conditioning(10.0);
                args.push(out("quant", Type::Acc, [1], near));
                if self.entropies {
                    args.push(out("c", Type::Acc, [k], near.size(1.0)));
                    args.push(out("sample", Type::Acc, [1], near.size(1e-3)));
                    args.push(out("avg", Type::Acc, [1], near.size(1.0)));
                }
                args
            },
            |dev, v| {
                let a = IbqLosses {
                    z: v.input("z"),
                    e: v.input("e"),
                    idx: v.input("idx"),
                    rest_q: v.input_if("rest_q"),
                    xbar: v.input_if("xbar"),
                    col: v.input_if("col"),
                    inv_count: v.input("inv_count"),
                    zq: v.out("zq"),
                    c: v.out_if("c"),
                    quant: v.out("quant"),
                    sample: v.out_if("sample"),
                    avg: v.out_if("avg"),
                    eps: EPS,
                    beta_commit: BETA_COMMIT,
                    beta_code: BETA_CODE,
                };
                dev.ibq_losses(S, &a)
            },
        )
    }

    fn idx(&self, stats: &Stats) -> Arg {
        int("idx", stats["idx"].iter().map(|&v| v as i32).collect())
    }

    // ---- gradients -------------------------------------------------------------------------------------

    fn bwd(self) -> Case {
        let [m, k, dim] = self.shape;
        Case::new(
            self.text(),
            move |d| {
                let mut args = self.inputs(d);
                let stats = self.stats(d, &args);
                args.push(self.idx(&stats));
                args.extend(["smax", "rest_p"].map(|name| acc(name, [m], stats[name].clone())));
                let inv = 1.0 / m.max(1) as f64;
                if self.entropies {
                    args.extend(["rest_q", "xbar"].map(|name| acc(name, [m], stats[name].clone())));
                    args.push(acc("c", [k], slopes(&stats["col"], inv)));
                    // As large as the other gradients of a token.
                    args.push(acc("g_sample", [1], vec![0.3 * self.temperature / inv]));
                    args.push(acc("g_avg", [1], vec![-0.4 * self.temperature / inv]));
                }
                args.push(acc("inv_count", [1], vec![inv]));
                args.push(act("g", [m, dim], d.times(1.0, m * dim)));
                args.push(acc("g_quant", [1], vec![0.2 * dim as f64 / inv]));
                // In bf16, the gradient of zq, which the direct terms make as long as z, is rounded before it is multiplied
                // with the codes, like any activation. For long tokens its products with e_k - e_t cancel where p is not 0.
                let cancelling = (d.scale / 4.0).max(1.0);
                let near = self.near(d).roundings(1.5 * cancelling).coarse().size(0.3);
                args.push(out("dz", Type::Act, [m, dim], near).dense());
                if self.de {
                    args.push(add("de", Type::Acc, [k, dim], d.times(1.0, k * dim), near).dense());
                }
                args
            },
            move |dev, v| {
                let a = IbqBwd {
                    z: v.input("z"),
                    e: v.input("e"),
                    idx: v.input("idx"),
                    smax: v.input("smax"),
                    rest_p: v.input("rest_p"),
                    rest_q: v.input_if("rest_q"),
                    xbar: v.input_if("xbar"),
                    c: v.input_if("c"),
                    inv_count: v.input("inv_count"),
                    g: v.input("g"),
                    g_quant: v.input("g_quant"),
                    g_sample: v.input_if("g_sample"),
                    g_avg: v.input_if("g_avg"),
                    dz: v.out("dz"),
                    de: v.acc_if("de"),
                    temperature: self.temperature,
                    beta_commit: BETA_COMMIT,
                    beta_code: BETA_CODE,
                };
                dev.ibq_bwd(S, &a)
            },
        )
    }
}

/// The derivative of the average entropy with respect to each share.
fn slopes(col: &[f64], inv: f64) -> Vec<f64> {
    let slope = |share: f64| -((share + EPS).ln() + share / (share + EPS));
    col.iter().map(|n| slope(n * inv)).collect()
}

// ---- cases ---------------------------------------------------------------------------------------------

/// Partial tiles in all three dimensions, and several chunks of tokens and codes. The large shapes run on a GPU only.
fn shapes() -> Vec<(Size, Shape)> {
    let small: [Shape; 13] = [
        [1, 1, 1],
        [7, 1, 8],
        [1, 70, 16],
        [3, 5, 7],
        [2, 257, 8],
        [130, 9, 4],
        [33, 63, 16],
        [5, 129, 16],
        [65, 64, 40],
        [64, 127, 64],
        [127, 65, 256],
        [129, 1031, 24],
        [0, 5, 8],
    ];
    let large: [Shape; 5] =
        [[1031, 8192, 256], [67, 131_071, 64], [33, 131_073, 32], [4200, 1024, 64], [2100, 6000, 512]];
    // The second has more tokens of one code than a warp adds by itself.
    let first = [(Size::Sanitizer, [20, 40, 16]), (Size::Sanitizer, [50, 2, 16])].into_iter();
    first.chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s))).collect()
}

fn all(of: fn(Problem) -> Case, named: &[Data]) -> Vec<Case> {
    let every = shapes().into_iter().map(|(size, shape)| of(problem(shape)).from(size));
    let cold = |shape| Problem { temperature: 0.01, ..problem(shape) };
    let named = named.iter().flat_map(|&data| {
        [[21, 66, 16], [67, 140, 64]]
            .map(|shape| of(Problem { data, ..problem(shape) }).named(&format!("{data:?}")))
    });
    let unit = of(Problem { data: Data::Unit, ..cold([21, 66, 24]) }).named("Unit");
    let cold = [of(cold([19, 70, 16])), of(cold([130, 1000, 32])), unit];
    every.chain(cold).chain(named).chain(edges(of)).collect()
}

/// Numbers of codes around 2^17, and dimensions that are multiples of 8 but not of 16, up to the largest.
fn edges(of: fn(Problem) -> Case) -> impl Iterator<Item = Case> {
    const MANY: [Shape; 3] = [[2, 131_071, 8], [3, 131_072, 8], [1, 131_073, 8]];
    const WIDE: [Shape; 3] = [[4, 9, 264], [3, 7, 504], [5, 6, 512]];
    let edge = move |shape| of(problem(shape)).named("edge");
    MANY.map(edge).into_iter().chain(WIDE.map(|shape| edge(shape).on_shim()))
}

/// The same without entropies, for kernels that support it.
fn bare(of: fn(Problem) -> Case) -> Vec<Case> {
    let bare = |shape| Problem { entropies: false, ..problem(shape) };
    let shapes = [[20, 41, 16], [5, 129, 16], [129, 300, 24]];
    let first = of(bare([18, 40, 16])).from(Size::Sanitizer);
    [first].into_iter().chain(shapes.map(|s| of(bare(s)))).collect()
}

const VALUES: [Data; 6] = [Data::Sure, Data::Duplicates, Data::Equal, Data::Flat, Data::Huge, Data::Nan];
const GRADIENTS: [Data; 5] = [Data::Sure, Data::Duplicates, Data::Equal, Data::Flat, Data::Huge];

pub fn rows() -> Vec<Case> {
    all(Problem::rows, &VALUES).into_iter().chain(bare(Problem::rows)).collect()
}

pub fn rows_sample() -> Case {
    problem([3, 4, 8]).rows()
}

pub fn cols() -> Vec<Case> {
    all(Problem::cols, &VALUES)
}

pub fn cols_sample() -> Case {
    problem([3, 4, 8]).cols()
}

pub fn losses() -> Vec<Case> {
    all(Problem::losses, &GRADIENTS).into_iter().chain(bare(Problem::losses)).collect()
}

pub fn losses_sample() -> Case {
    problem([3, 4, 8]).losses()
}

pub fn bwd() -> Vec<Case> {
    let frozen = Problem { de: false, ..problem([35, 70, 16]) }.bwd();
    all(Problem::bwd, &GRADIENTS).into_iter().chain(bare(Problem::bwd)).chain([frozen]).collect()
}

pub fn bwd_sample() -> Case {
    problem([3, 4, 8]).bwd()
}

// ---- plain VQ ------------------------------------------------------------------------------------------

/// z, e, idx and inv_count; a few codes have most of the tokens.
fn vq_inputs(d: &Draw, [m, k, dim]: Shape) -> Vec<Arg> {
    let few = d.ids(m, k.div_ceil(4));
    let idx = d.ids(m, k).into_iter().zip(few).enumerate();
    let idx: Vec<i32> = idx.map(|(i, (any, few))| if i % 3 == 0 { any } else { few }).collect();
    vec![
        act("z", [m, dim], d.normal(m * dim)),
        act("e", [k, dim], d.normal(k * dim)),
        int("idx", idx),
        input("inv_count", Type::Acc, [1], vec![1.0 / m.max(1) as f64]),
    ]
}

fn vq_losses_case(shape: Shape) -> Case {
    let [m, k, dim] = shape;
    Case::new(
        format!("[{m}, {dim}] of [{k}, {dim}]"),
        move |d| {
            let mut args = vq_inputs(d, shape);
            args.push(out("zq", Type::Act, [m, dim], Judge::Exact));
            // The CPU adds thousands of squares one by one in f32.
            args.push(out("quant", Type::Acc, [1], near().conditioning(10.0)));
            args
        },
        |dev, v| {
            let a = VqLosses {
                z: v.input("z"),
                e: v.input("e"),
                idx: v.input("idx"),
                inv_count: v.input("inv_count"),
                zq: v.out("zq"),
                quant: v.out("quant"),
                beta_commit: 0.25,
                beta_code: 1.0,
            };
            dev.vq_losses(S, &a)
        },
    )
}

fn vq_bwd_case(shape: Shape, de: bool) -> Case {
    let [m, k, dim] = shape;
    Case::new(
        format!("[{m}, {dim}] of [{k}, {dim}]{}", if de { "" } else { ", without de" }),
        move |d| {
            let mut args = vq_inputs(d, shape);
            args.push(act("g", [m, dim], d.normal(m * dim)));
            args.push(acc("g_quant", [1], vec![0.7 * (m * dim) as f64]));
            args.push(out("dz", Type::Act, [m, dim], near().conditioning(1.0).size(d.scale)).dense());
            if de {
                // Sums over many tokens, which cancel.
                let near = near().conditioning(3.0).size(d.scale);
                args.push(add("de", Type::Acc, [k, dim], d.normal(k * dim), near).dense());
            }
            args
        },
        |dev, v| {
            let a = VqBwd {
                z: v.input("z"),
                e: v.input("e"),
                idx: v.input("idx"),
                inv_count: v.input("inv_count"),
                g: v.input("g"),
                g_quant: v.input("g_quant"),
                dz: v.out("dz"),
                de: v.acc_if("de"),
                beta_commit: 0.25,
                beta_code: 1.0,
            };
            dev.vq_bwd(S, &a)
        },
    )
}

const VQ_EDGES: [Shape; 2] = [[4, 9, 264], [3, 7, 512]];

fn vq_shapes() -> Vec<(Size, Shape)> {
    let small: [Shape; 8] = [
        [1, 1, 1],
        [3, 5, 7],
        [64, 3, 8],
        [33, 70, 16],
        [200, 9, 3],
        [129, 31, 64],
        [70, 12, 300],
        [0, 5, 8],
    ];
    let large: [Shape; 4] = [[16_384, 8192, 256], [5000, 131_072, 64], [50, 131_073, 8], [9000, 2, 520]];
    let first = [(Size::Sanitizer, [20, 11, 32]), (Size::Sanitizer, [50, 2, 32])].into_iter();
    first.chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s))).collect()
}

pub fn vq_losses() -> Vec<Case> {
    let every = vq_shapes().into_iter().map(|(size, shape)| vq_losses_case(shape).from(size));
    every.chain(VQ_EDGES.map(|shape| vq_losses_case(shape).named("edge").on_shim())).collect()
}

pub fn vq_losses_sample() -> Case {
    vq_losses_case([3, 4, 5])
}

pub fn vq_bwd() -> Vec<Case> {
    let every = vq_shapes().into_iter().enumerate();
    let every = every.map(|(i, (size, shape))| vq_bwd_case(shape, i % 4 != 3).from(size));
    every.chain(VQ_EDGES.map(|shape| vq_bwd_case(shape, true).named("edge").on_shim())).collect()
}

pub fn vq_bwd_sample() -> Case {
    vq_bwd_case([3, 4, 5], true)
}
