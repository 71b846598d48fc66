//! Products and sums of columns.

use ett::backend::{ColSum, DType, LinearGelu, Matmul, MatmulAcc, Stream};

use super::Size;
use super::case::{Case, Draw, LIGHT, Near, Type, act, add, near, out};

const S: Stream = Stream::COMPUTE;

/// N, C, O of `[N, C] x [C, O]`.
type Shape = [usize; 3];

const SMALL: [Shape; 16] = [
    [1, 1, 1],
    [1, 129, 1],
    [7, 3, 5],
    [16, 64, 1],
    [2, 256, 24],
    [31, 33, 65],
    [33, 65, 31],
    [63, 31, 33],
    [64, 64, 64],
    [65, 16, 127],
    [127, 40, 129],
    [129, 7, 128],
    [128, 96, 136],
    [3, 257, 131],
    [0, 5, 3],
    [5, 0, 3],
];
const LARGE: [Shape; 6] = [
    [257, 1536, 1536],
    [1031, 1536, 256],
    [128, 1536, 8960],
    [131, 8960, 1536],
    [4099, 67, 257],
    [1, 1536, 2048],
];

/// All shapes, with alternating transpositions and bias; the sanitizers get every combination of transpositions.
fn shapes() -> impl Iterator<Item = (Size, Shape, [bool; 3])> {
    const WAYS: [(bool, bool); 4] = [(false, true), (false, false), (true, false), (true, true)];
    let sanitizer = WAYS.into_iter().map(|(ta, tb)| (Size::Sanitizer, [16, 32, 24], [ta, tb, true]));
    let small = SMALL.into_iter().enumerate().flat_map(|(i, shape)| {
        // The transposition of linear layers with every shape, the others alternately.
        [WAYS[0], WAYS[1 + i % 3]].map(|(ta, tb)| (Size::Tiny, shape, [ta, tb, i % 2 == 0]))
    });
    let large = LARGE.into_iter().enumerate().flat_map(|(i, shape)| {
        [WAYS[0], WAYS[1 + i % 3]].map(|(ta, tb)| (Size::Full, shape, [ta, tb, i % 2 == 1]))
    });
    sanitizer.chain(small).chain(large)
}

fn text([n, c, o]: Shape, ta: bool, tb: bool) -> String {
    let t = |yes| if yes { " transposed" } else { "" };
    format!("[{n}, {c}]{} x [{c}, {o}]{}", t(ta), t(tb))
}

fn dims(rows: usize, cols: usize, transposed: bool) -> [usize; 2] {
    if transposed { [cols, rows] } else { [rows, cols] }
}

/// Size of sums of `terms` products of two operands of the run's scale.
fn sum_of(d: &Draw, terms: usize) -> f64 {
    d.scale * d.scale * (terms as f64).sqrt()
}

/// Tensor cores add bf16 products to f32 sums that are truncated, not rounded, so the error grows with the length of
/// the sum. The factor corresponds to one truncation per 16 products, with some room.
fn cut(near: Near, d: &Draw, terms: usize) -> Near {
    if d.prec.act == DType::Bf16 { near.conditioning(terms as f64 / 128.0) } else { near }
}

fn matmul_case([n, c, o]: Shape, [ta, tb, bias]: [bool; 3]) -> Case {
    let with = if bias { " with bias" } else { "" };
    Case::new(
        text([n, c, o], ta, tb) + with,
        move |d| {
            let mut args =
                vec![act("a", dims(n, c, ta), d.normal(n * c)), act("b", dims(c, o, tb), d.normal(c * o))];
            if bias {
                args.push(act("bias", [o], d.normal(o)));
            }
            args.push(out("y", Type::Act, [n, o], near().size(sum_of(d, c))));
            args
        },
        move |dev, v| {
            let (a, b, bias) = (v.input("a"), v.input("b"), v.input_if("bias"));
            dev.matmul(S, &Matmul { a, b, ta, tb, bias, y: v.out("y") })
        },
    )
}

pub fn matmul() -> Vec<Case> {
    shapes().map(|(size, shape, how)| matmul_case(shape, how).from(size)).collect()
}

pub fn matmul_sample() -> Case {
    matmul_case([3, 4, 5], [false, true, true])
}

fn linear_gelu_case([n, c, o]: Shape, bias: bool) -> Case {
    let with = if bias { " with bias" } else { "" };
    Case::new(
        text([n, c, o], false, true) + with,
        move |d| {
            let size = sum_of(d, c);
            let mut args = vec![act("x", [n, c], d.normal(n * c)), act("w", [o, c], d.normal(o * c))];
            if bias {
                args.push(act("bias", [o], d.normal(o)));
            }
            args.push(out("pre", Type::Act, [n, o], near().size(size)));
            args.push(out("y", Type::Act, [n, o], near().size(size)));
            args
        },
        move |dev, v| {
            let (x, w, bias) = (v.input("x"), v.input("w"), v.input_if("bias"));
            dev.linear_gelu(S, &LinearGelu { x, w, bias, pre: v.out("pre"), y: v.out("y") })
        },
    )
}

pub fn linear_gelu() -> Vec<Case> {
    let first = [true, false].map(|bias| linear_gelu_case([16, 32, 24], bias).from(Size::Sanitizer));
    let small = SMALL.into_iter().enumerate().map(|(i, shape)| linear_gelu_case(shape, i % 2 == 0));
    let large = [[1024, 256, 1536], [257, 1536, 1536], [131, 67, 1031]];
    let large = large.map(|shape| linear_gelu_case(shape, true).from(Size::Full).runs(LIGHT));
    first.into_iter().chain(small).chain(large).collect()
}

pub fn linear_gelu_sample() -> Case {
    linear_gelu_case([3, 4, 5], true)
}

fn matmul_acc_case([n, c, o]: Shape, [ta, tb, _]: [bool; 3]) -> Case {
    Case::new(
        text([n, c, o], ta, tb),
        move |d| {
            let size = sum_of(d, c);
            vec![
                act("a", dims(n, c, ta), d.normal(n * c)),
                act("b", dims(c, o, tb), d.normal(c * o)),
                add("y", Type::Acc, [n, o], d.times(size.max(d.scale), n * o), cut(near().size(size), d, c)),
            ]
        },
        move |dev, v| {
            dev.matmul_acc(S, &MatmulAcc { a: v.input("a"), b: v.input("b"), ta, tb, y: v.acc("y") })
        },
    )
}

pub fn matmul_acc() -> Vec<Case> {
    // Weight gradients are transposed [C, N] x [N, O]: sums over all tokens.
    let gradients = [[1536, 4099, 256], [256, 1031, 8960], [896, 2048, 128]];
    let gradients = gradients.map(|shape| matmul_acc_case(shape, [true, false, false]).from(Size::Full));
    let all = shapes().map(|(size, shape, how)| matmul_acc_case(shape, how).from(size));
    all.chain(gradients).collect()
}

pub fn matmul_acc_sample() -> Case {
    matmul_acc_case([3, 4, 5], [false, true, false])
}

fn col_sum_case(n: usize, c: usize) -> Case {
    Case::new(
        format!("[{n}, {c}]"),
        move |d| {
            let size = d.scale * (n as f64).sqrt();
            vec![
                act("x", [n, c], d.normal(n * c)),
                add("y", Type::Acc, [c], d.times(size, c), near().size(size)),
            ]
        },
        |dev, v| dev.col_sum(S, &ColSum { x: v.input("x"), y: v.acc("y") }),
    )
}

pub fn col_sum() -> Vec<Case> {
    let small = [
        (1, 1),
        (1, 257),
        (2, 64),
        (31, 33),
        (32, 32),
        (67, 7),
        (129, 127),
        (255, 1),
        (256, 130),
        (257, 256),
        (1009, 3),
        (1030, 8),
        (0, 4),
    ];
    let large = [(4099, 1536), (513, 8960), (65_537, 64), (100_003, 1), (1031, 8961)];
    let first = std::iter::once(col_sum_case(24, 40).from(Size::Sanitizer));
    let small = small.map(|(n, c)| col_sum_case(n, c));
    let large = large.map(|(n, c)| col_sum_case(n, c).from(Size::Full).runs(LIGHT));
    first.chain(small).chain(large).collect()
}

pub fn col_sum_sample() -> Case {
    col_sum_case(3, 4)
}
