//! Sampling: every device gives the same index as the CPU, because all of them compute in f64.

use ett::backend::{DType, Sample, Stream};

use super::Size;
use super::case::{Case, Judge, Type, act, add, int, out};

const S: Stream = Stream::COMPUTE;

/// Parameters of sampling.
#[derive(Debug, Clone, Copy)]
struct How {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    guidance: f64,
}

const ALL: How = How { temperature: 1.0, top_k: 0, top_p: 1.0, guidance: 1.0 };
const GREEDY: How = How { temperature: 0.0, ..ALL };
const TOP_K: How = How { top_k: 7, ..ALL };
const TOP_P: How = How { top_p: 0.8, temperature: 0.7, ..ALL };
const EVERYTHING: How = How { temperature: 1.3, top_k: 40, top_p: 0.9, guidance: 3.0 };

/// Changes the logits of a case.
type Change = fn(&mut Vec<f64>, usize);

fn case([b, v]: [usize; 2], how: How, change: Change) -> Case {
    Case::new(
        format!("[{b}, {v}], {how:?}"),
        move |d| {
            let mut logits = d.normal(b * v);
            change(&mut logits, v);
            let mut args = vec![act("logits", [b, v], logits)];
            if how.guidance != 1.0 {
                args.push(act("without", [b, v], d.normal(b * v)));
            }
            let first: Vec<f64> = d.ids(b, 5000).into_iter().map(f64::from).collect();
            args.extend([
                int("number", d.ids(b, 100)),
                add("position", Type::Is(DType::I32), [b], first, Judge::Exact),
                out("idx", Type::Is(DType::I32), [b], Judge::Exact),
            ]);
            args
        },
        move |dev, v| {
            let a = Sample {
                logits: v.input("logits"),
                without: v.input_if("without"),
                number: v.input("number"),
                position: v.acc("position"),
                idx: v.out("idx"),
                temperature: how.temperature,
                top_k: how.top_k,
                top_p: how.top_p,
                guidance: how.guidance,
                seed: 0x1234_5678_9abc_def0,
            };
            dev.sample(S, &a)
        },
    )
}

fn as_they_are(_: &mut Vec<f64>, _: usize) {}

pub fn cases() -> Vec<Case> {
    let ways = [ALL, GREEDY, TOP_K, TOP_P, EVERYTHING];
    let mut all: Vec<Case> =
        ways.iter().map(|&how| case([3, 300], how, as_they_are).from(Size::Sanitizer)).collect();
    for (i, shape) in [[1, 1], [5, 7], [2, 31], [1, 1023], [1, 1025], [9, 33], [0, 8]].into_iter().enumerate()
    {
        all.push(case(shape, ways[i % 5], as_they_are).from(Size::Tiny));
        all.push(case(shape, ways[(i + 3) % 5], as_they_are).from(Size::Tiny));
    }
    for shape in [[16, 131_072], [64, 8193], [3, 151_936], [2, 1 << 20]] {
        all.extend(ways.map(|how| case(shape, how, as_they_are).from(Size::Full)));
        let many = How { top_k: shape[1] / 3, top_p: 0.99, temperature: 3.0, ..ALL };
        all.push(case(shape, many, as_they_are).from(Size::Full));
    }
    let equal: Change = |l, _| l.fill(0.5);
    let ties: Change = |l, _| l.iter_mut().for_each(|l| *l = (2.0 * *l).round());
    let zeros: Change = |l, _| l.iter_mut().enumerate().for_each(|(i, l)| *l = [-0.0, 0.0][i % 2]);
    let far: Change = |l, _| l.iter_mut().for_each(|l| *l *= 1e30);
    // Rows with a NaN, with nothing finite, with an infinity, with some impossible values, and unchanged.
    let bad: Change = |l, v| {
        l[v / 2] = f64::NAN;
        l[v..2 * v].fill(f64::NEG_INFINITY);
        l[2 * v + 1] = f64::INFINITY;
        l[3 * v..3 * v + v / 2].fill(f64::NEG_INFINITY);
    };
    for (change, name) in [
        (equal, "all equal"),
        (ties, "many equal"),
        (zeros, "zeros of both signs"),
        (far, "large"),
        (bad, "rows that nothing can be drawn from"),
    ] {
        all.extend(ways.map(|how| case([5, 60], how, change).named(name)));
    }
    all
}

pub fn sample() -> Case {
    case([3, 4], EVERYTHING, as_they_are)
}
