//! Operations on rows by position and by index.

use ett::backend::{Arange, CountUp, DType, GatherBwd, GatherFwd, Pick, PutRows, Rope, Stream};

use super::Size;
use super::case::{Arg, Case, Draw, Judge, Layout, RAGGED, Type, acc, act, add, input, int, near, out};

const S: Stream = Stream::COMPUTE;

// ---- rotary embedding ----------------------------------------------------------------------------------

/// Error per position: angles are position times frequency in f32, so their error is a few roundings of the angle,
/// which the largest position bounds.
const ANGLE: f64 = 0.1;

#[derive(Clone, Copy)]
struct Turn {
    n: usize,
    heads: usize,
    head_dim: usize,
    /// Columns after the heads, which are copied.
    extra: usize,
    /// The last position; the others are smaller.
    last: i32,
    theta: f64,
    inverse: bool,
}

impl Turn {
    fn cols(&self) -> usize {
        self.heads * self.head_dim + self.extra
    }

    fn positions(&self, d: &Draw) -> Vec<i32> {
        let mut position = d.ids(self.n, self.last.max(1) as usize);
        if let Some(last) = position.last_mut() {
            *last = self.last;
        }
        position
    }

    fn text(&self) -> String {
        let Turn { n, heads, head_dim, extra, last, theta, inverse } = self;
        let back = if *inverse { ", inverse" } else { "" };
        format!("[{n}, {heads}*{head_dim} + {extra}], positions to {last}, theta {theta}{back}")
    }

    fn case(self) -> Case {
        let Turn { n, heads, head_dim, last, theta, inverse, .. } = self;
        let c = self.cols();
        Case::new(
            self.text(),
            move |d| {
                // A rotation may turn one half of a pair to zero.
                let near = near().size(0.5 * d.scale).conditioning(1.0 + ANGLE * f64::from(last));
                vec![
                    act("x", [n, c], d.normal(n * c)),
                    int("position", self.positions(d)),
                    out("y", Type::Act, [n, c], near),
                ]
            },
            move |dev, v| {
                let (x, position, y) = (v.input("x"), v.input("position"), v.out("y"));
                dev.rope(S, &Rope { x, position, y, heads, head_dim, theta, inverse })
            },
        )
    }

    /// A rotation and its inverse: the same angles twice, with the same error.
    fn undone(self) -> Case {
        let Turn { n, heads, head_dim, theta, .. } = self;
        let c = self.cols();
        Case::new(
            self.text() + " and back",
            move |d| {
                let angles = 1.0 + ANGLE * f64::from(self.last);
                vec![
                    act("x", [n, c], d.normal(n * c)),
                    int("position", self.positions(d)),
                    out("y", Type::Act, [n, c], near().conditioning(angles)),
                    out("back", Type::Act, [n, c], near().roundings(2.0)),
                ]
            },
            move |dev, v| {
                let (x, position, y, back) = (v.input("x"), v.input("position"), v.out("y"), v.out("back"));
                dev.rope(S, &Rope { x, position, y, heads, head_dim, theta, inverse: false })?;
                let x = y.0;
                dev.rope(S, &Rope { x, position, y: back, heads, head_dim, theta, inverse: true })
            },
        )
        .runs(&[(1.0, &[Layout::Dense, Layout::Odd])])
    }
}

const TURN: Turn = Turn { n: 5, heads: 2, head_dim: 16, extra: 0, last: 31, theta: 1e4, inverse: false };

pub fn rope() -> Vec<Case> {
    let small = [
        Turn { extra: 8, ..TURN },
        Turn { n: 1, heads: 1, head_dim: 2, last: 1, ..TURN },
        Turn { n: 1, last: 0, ..TURN },
        Turn { n: 7, heads: 3, head_dim: 6, extra: 5, ..TURN },
        Turn { n: 33, heads: 1, head_dim: 64, extra: 1, inverse: true, ..TURN },
        Turn { n: 3, heads: 12, head_dim: 128, extra: 512, last: 4095, theta: 1e6, ..TURN },
        Turn { n: 2, heads: 0, extra: 16, ..TURN },
        Turn { n: 3, heads: 14, head_dim: 130, last: 100, inverse: true, ..TURN },
        Turn { n: 9, head_dim: 128, last: 100_000, theta: 1e6, ..TURN },
        Turn { n: 0, ..TURN },
    ];
    let large = [
        Turn { n: 1031, heads: 14, head_dim: 128, extra: 256, last: 32_767, theta: 1e6, ..TURN },
        Turn { n: 4099, heads: 12, head_dim: 128, extra: 1, last: 4098, theta: 1e6, inverse: true },
    ];
    let undone = [
        Turn { n: 9, head_dim: 128, last: 100_000, theta: 1e6, ..TURN },
        Turn { n: 17, heads: 3, head_dim: 22, extra: 3, last: 511, ..TURN },
    ];
    let first = [TURN.case().from(Size::Sanitizer)].into_iter();
    let small = small.into_iter().map(Turn::case).chain(undone.into_iter().map(Turn::undone));
    first.chain(small).chain(large.into_iter().map(|t| t.case().from(Size::Full))).collect()
}

pub fn rope_sample() -> Case {
    Turn { n: 3, heads: 2, head_dim: 2, extra: 1, last: 7, ..TURN }.case()
}

// ---- rows of tables ------------------------------------------------------------------------------------

/// Number of gathered rows, rows of the table, columns.
type Shape = [usize; 3];

fn shapes() -> impl Iterator<Item = (Size, Shape)> {
    let small: [Shape; 11] = [
        [1, 1, 1],
        [1, 5, 257],
        [7, 3, 5],
        [65, 2, 33],
        [33, 129, 64],
        [128, 1, 31],
        [301, 131, 16],
        [3, 7, 1025],
        [129, 64, 8],
        [256, 9, 2],
        [0, 3, 8],
    ];
    let large: [Shape; 4] = [[4099, 131_072, 256], [8191, 151, 1536], [2048, 8193, 1536], [20_011, 3, 64]];
    let all = [(Size::Sanitizer, [20, 7, 40])].into_iter();
    all.chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s)))
}

/// Repeated indices, some of them negative, and both ends of the table.
fn indices(d: &Draw, [n, r, _]: Shape) -> Vec<i32> {
    let mut idx = d.ids(n, r);
    for (i, at) in idx.iter_mut().enumerate() {
        match i % 8 {
            3 => *at = -1,
            5 => *at = [i32::MIN, -2, -7][i % 3],
            6 => *at = r as i32 - 1,
            _ => {}
        }
    }
    idx
}

fn gather_fwd_case(shape: Shape) -> Case {
    let [n, r, c] = shape;
    Case::new(
        format!("{n} of [{r}, {c}]"),
        move |d| {
            let y = out("y", Type::Act, [n, c], Judge::Exact);
            vec![act("table", [r, c], d.normal(r * c)), int("idx", indices(d, shape)), y]
        },
        |dev, v| {
            let (table, idx) = (v.input("table"), v.input("idx"));
            dev.gather_fwd(S, &GatherFwd { table, idx, y: v.out("y") })
        },
    )
}

pub fn gather_fwd() -> Vec<Case> {
    let one = with_indices(gather_fwd_case([1, 9, 8]), vec![7]).runs(RAGGED);
    shapes().map(|(size, shape)| gather_fwd_case(shape).copied(size)).chain([one]).collect()
}

fn with_indices(case: Case, indices: Vec<i32>) -> Case {
    let args = case.args;
    let args = move |d: &Draw| {
        let mut args = args(d);
        let idx = args.iter_mut().find(|a| a.name == "idx").expect("a case with indices");
        *idx = int("idx", indices.clone());
        args
    };
    Case { args: Box::new(args), ..case }
}

/// Indices below the smallest size of the table that is tried.
fn plain_indices(case: Case, n: usize) -> Case {
    with_indices(case, (0..n as i32).map(|i| i % 2).collect())
}

pub fn gather_fwd_sample() -> Case {
    plain_indices(gather_fwd_case([3, 4, 5]), 3)
}

fn gather_bwd_case(shape: Shape) -> Case {
    let [n, r, c] = shape;
    Case::new(
        format!("{n} into [{r}, {c}]"),
        move |d| {
            let size = d.scale * (n as f64 / r as f64).sqrt().max(1.0);
            vec![
                act("dy", [n, c], d.normal(n * c)),
                int("idx", indices(d, shape)),
                add("dtable", Type::Acc, [r, c], d.times(size, r * c), near().size(size)),
            ]
        },
        |dev, v| {
            let (dy, idx) = (v.input("dy"), v.input("idx"));
            dev.gather_bwd(S, &GatherBwd { dy, idx, dtable: v.acc("dtable") })
        },
    )
}

/// Repeated rows are added in the order of n: the bits equal those of a plain loop in f32.
fn in_order() -> Case {
    const N: usize = 500;
    Case::new(
        format!("{N} into one row, in order"),
        |d| {
            let near = super::case::Judge::By(|seen| {
                let dy = seen.input("dy").values().expect("an input");
                let start = seen.input("dtable").values().expect("a start");
                let mut sum = start[0] as f32;
                dy.iter().for_each(|&v| sum += v as f32);
                match seen.got[0] == f64::from(sum) {
                    true => Ok(()),
                    false => Err(format!("{}: {:e}, wanted {sum:e}, added in order", seen.what, seen.got[0])),
                }
            });
            vec![
                act("dy", [N, 1], d.normal(N)),
                int("idx", vec![0; N]),
                add("dtable", Type::Acc, [1, 1], d.normal(1), near),
            ]
        },
        |dev, v| {
            let (dy, idx) = (v.input("dy"), v.input("idx"));
            dev.gather_bwd(S, &GatherBwd { dy, idx, dtable: v.acc("dtable") })
        },
    )
}

pub fn gather_bwd() -> Vec<Case> {
    shapes().map(|(size, shape)| gather_bwd_case(shape).from(size)).chain([in_order()]).collect()
}

pub fn gather_bwd_sample() -> Case {
    plain_indices(gather_bwd_case([3, 4, 5]), 3)
}

/// `n` rows to rows of a table that are spread over it in another order; every fifth is skipped.
fn put_rows_case([n, r, c]: Shape, ty: Type) -> Case {
    Case::new(
        format!("{n} into [{r}, {c}] of {ty:?}"),
        move |d| {
            let to = |i: usize| if i % 5 == 3 { -1 } else { (r - 1 - i * r / n) as i32 };
            // Integers from 0 to 255.
            let values = |n| d.ids(n, 256).into_iter().map(f64::from).collect();
            vec![
                input("x", ty, [n, c], values(n * c)),
                int("idx", (0..n).map(to).collect()),
                add("y", ty, [r, c], values(r * c), Judge::Exact),
            ]
        },
        |dev, v| dev.put_rows(S, &PutRows { x: v.input("x"), idx: v.input("idx"), y: v.acc("y") }),
    )
}

pub fn put_rows() -> Vec<Case> {
    let small = [[1, 1, 1], [3, 3, 8], [0, 2, 4], [7, 9, 5], [33, 40, 64], [20, 70, 256], [4, 4, 0]];
    let all = small.map(|shape| (Size::Tiny, shape)).into_iter();
    let all = all.chain([(Size::Sanitizer, [5, 7, 16]), (Size::Full, [513, 3000, 512])]);
    let types = [Type::Act, Type::Is(DType::F64), Type::Is(DType::I32), Type::Is(DType::U8)];
    let one = put_rows_case([1, 9, 8], Type::Act).runs(RAGGED);
    all.flat_map(|(size, shape)| types.map(|ty| put_rows_case(shape, ty).copied(size))).chain([one]).collect()
}

pub fn put_rows_sample() -> Case {
    plain_indices(put_rows_case([2, 4, 5], Type::Act), 2)
}

// ---- integers ------------------------------------------------------------------------------------------

/// Numbers of integers.
fn counts() -> impl Iterator<Item = (Size, usize)> {
    let small = [0, 1, 3, 96, 1000].map(|n| (Size::Tiny, n)).into_iter();
    small.chain([(Size::Sanitizer, 5), (Size::Full, 1_000_003)])
}

/// An output of `n` integers.
fn integers(n: usize) -> Arg {
    out("y", Type::Is(DType::I32), [n], Judge::Exact)
}

fn pick_case(n: usize, r: usize) -> Case {
    Case::new(
        format!("{n} of {r}"),
        move |d| {
            // Also -1, as the targets of positions without one.
            let x = d.ids(r, 1 << 24).into_iter().map(|v| v - 1).collect();
            vec![int("x", x), int("idx", indices(d, [n, r, 1])), integers(n)]
        },
        |dev, v| dev.pick(S, &Pick { x: v.input("x"), idx: v.input("idx"), y: v.out("y") }),
    )
}

pub fn pick() -> Vec<Case> {
    counts().flat_map(|(size, n)| [1, 7, 1000].map(|r| pick_case(n, r).copied(size))).collect()
}

pub fn pick_sample() -> Case {
    plain_indices(pick_case(3, 4), 3)
}

/// `bad`: the number of non-finite values, if there is a `norm`.
fn count_up_case(n: usize, bad: Option<f64>) -> Case {
    Case::new(
        match bad {
            Some(bad) => format!("{n}, {bad} not finite"),
            None => format!("{n}"),
        },
        move |_| {
            let start = (0..n).map(|i| if i == 1 { f64::from(i32::MAX) } else { i as f64 - 3.0 }).collect();
            let x = add("x", Type::Is(DType::I32), [n], start, Judge::Exact);
            [x].into_iter().chain(bad.map(|bad| acc("norm", [2], vec![5.0, bad]))).collect()
        },
        |dev, v| dev.count_up(S, &CountUp { x: v.acc("x"), norm: v.input_if("norm") }),
    )
}

pub fn count_up() -> Vec<Case> {
    let bad = [None, Some(0.0), Some(1.0)];
    counts().flat_map(|(size, n)| bad.map(|bad| count_up_case(n, bad).copied(size))).collect()
}

pub fn count_up_sample() -> Case {
    count_up_case(3, Some(0.0))
}

fn arange_case(n: usize, step: usize) -> Case {
    Case::new(
        format!("{n} with step {step}"),
        move |_| vec![integers(n)],
        move |dev, v| dev.arange(S, &Arange { y: v.out("y"), step }),
    )
}

pub fn arange() -> Vec<Case> {
    let all = counts().flat_map(|(size, n)| [0, 1, 257].map(|step| arange_case(n, step).copied(size)));
    // The largest steps.
    let ends = [(1, i32::MAX as usize), (2, i32::MAX as usize), (3, 1_073_741_823), (32_769, 65_535)];
    all.chain(ends.map(|(n, step)| arange_case(n, step).copied(Size::Tiny))).collect()
}

pub fn arange_sample() -> Case {
    arange_case(3, 5)
}
