//! Upsampling and pooling by two.

use ett::backend::{MaxPool2x2Bwd, MaxPool2x2Fwd, Stream, Upsample2xBwd, Upsample2xFwd};

use super::Size;
use super::case::{Case, Draw, Judge, Type, act, near, out};

const S: Stream = Stream::COMPUTE;

/// B, H, W and C of the coarse image.
const SMALL: [[usize; 4]; 7] =
    [[1, 1, 1, 1], [2, 3, 5, 3], [1, 4, 2, 16], [3, 2, 3, 17], [2, 1, 6, 24], [0, 3, 2, 8], [1, 0, 2, 8]];
const LARGE: [[usize; 4]; 4] = [[2, 64, 48, 128], [1, 129, 65, 33], [3, 16, 16, 512], [2, 100, 3, 3]];

fn shapes() -> impl Iterator<Item = (Size, [usize; 4])> {
    let first = [[2, 3, 2, 16], [1, 2, 3, 5]].map(|s| (Size::Sanitizer, s));
    let small = SMALL.map(|s| (Size::Tiny, s));
    first.into_iter().chain(small).chain(LARGE.map(|s| (Size::Full, s)))
}

fn text([b, h, w, c]: [usize; 4]) -> String {
    format!("[{b}, {h}, {w}, {c}]")
}

fn fine([b, h, w, c]: [usize; 4]) -> [usize; 4] {
    [b, 2 * h, 2 * w, c]
}

fn numel(dims: [usize; 4]) -> usize {
    dims.iter().product()
}

fn up_fwd_case(coarse: [usize; 4]) -> Case {
    Case::new(
        text(coarse),
        move |d| {
            let y = out("y", Type::Act, fine(coarse), Judge::Exact);
            vec![act("x", coarse, d.normal(numel(coarse))), y]
        },
        |dev, v| dev.upsample2x_fwd(S, &Upsample2xFwd { x: v.input("x"), y: v.out("y") }),
    )
}

pub fn up_fwd() -> Vec<Case> {
    shapes().map(|(size, shape)| up_fwd_case(shape).from(size)).collect()
}

pub fn up_fwd_sample() -> Case {
    up_fwd_case([2, 3, 5, 7])
}

fn up_bwd_case(coarse: [usize; 4]) -> Case {
    Case::new(
        text(coarse),
        move |d| {
            // The sum of four values may cancel.
            let dx = out("dx", Type::Act, coarse, near().size(d.scale));
            vec![act("dy", fine(coarse), d.normal(numel(fine(coarse)))), dx]
        },
        |dev, v| dev.upsample2x_bwd(S, &Upsample2xBwd { dy: v.input("dy"), dx: v.out("dx") }),
    )
}

pub fn up_bwd() -> Vec<Case> {
    shapes().map(|(size, shape)| up_bwd_case(shape).from(size)).collect()
}

pub fn up_bwd_sample() -> Case {
    up_bwd_case([2, 3, 5, 7])
}

/// Values with many ties.
fn with_ties(d: &Draw, n: usize) -> Vec<f64> {
    d.unit(n).iter().map(|v| d.scale * (2.0 * v).round()).collect()
}

/// Dimensions of a fine image with up to one row and one column more than twice the coarse image.
fn odd([b, h, w, c]: [usize; 4], more: [usize; 2]) -> [usize; 4] {
    [b, 2 * h + more[0], 2 * w + more[1], c]
}

fn pool_fwd_case(coarse: [usize; 4], more: [usize; 2]) -> Case {
    let fine = odd(coarse, more);
    Case::new(
        text(fine),
        move |d| vec![act("x", fine, with_ties(d, numel(fine))), out("y", Type::Act, coarse, Judge::Exact)],
        |dev, v| dev.max_pool2x2_fwd(S, &MaxPool2x2Fwd { x: v.input("x"), y: v.out("y") }),
    )
}

/// Alternately even and odd sizes; among the small ones also images without a complete window.
fn pools(case: fn([usize; 4], [usize; 2]) -> Case) -> Vec<Case> {
    let more = |i: usize| [[0, 0], [1, 0], [0, 1], [1, 1]][i % 4];
    let all = shapes().enumerate().map(|(i, (size, shape))| case(shape, more(i)).from(size));
    let both = case([1, 2, 3, 16], [1, 1]).from(Size::Sanitizer);
    all.chain([both, case([2, 0, 3, 8], [1, 1]), case([1, 0, 0, 3], [1, 1])]).collect()
}

pub fn pool_fwd() -> Vec<Case> {
    pools(pool_fwd_case)
}

pub fn pool_fwd_sample() -> Case {
    pool_fwd_case([2, 3, 5, 7], [0, 0])
}

fn pool_bwd_case(coarse: [usize; 4], more: [usize; 2]) -> Case {
    let fine = odd(coarse, more);
    Case::new(
        text(fine),
        move |d| {
            vec![
                act("dy", coarse, d.normal(numel(coarse))),
                act("x", fine, with_ties(d, numel(fine))),
                out("dx", Type::Act, fine, Judge::Exact),
            ]
        },
        |dev, v| {
            dev.max_pool2x2_bwd(S, &MaxPool2x2Bwd { dy: v.input("dy"), x: v.input("x"), dx: v.out("dx") })
        },
    )
}

pub fn pool_bwd() -> Vec<Case> {
    pools(pool_bwd_case)
}

pub fn pool_bwd_sample() -> Case {
    pool_bwd_case([2, 3, 5, 7], [0, 0])
}
