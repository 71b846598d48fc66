//! Gradient norms and AdamW.

use ett::backend::{Adamw, Restore, Slot, Stream, SumSquares};

use super::Size;
use super::case::{Arg, Case, Draw, Judge, Seen, Type, acc, act, add, int, near, out};

const S: Stream = Stream::COMPUTE;

const SMALL: [usize; 9] = [1, 2, 31, 257, 1000, 4096, 16_385, 40_003, 0];
const LARGE: [usize; 2] = [1_000_003, 3 << 20];

fn sizes() -> impl Iterator<Item = (Size, usize)> {
    let first = [(Size::Sanitizer, 300)].into_iter();
    first.chain(SMALL.map(|n| (Size::Tiny, n))).chain(LARGE.map(|n| (Size::Full, n)))
}

// ---- gradient norms ------------------------------------------------------------------------------------

/// The sum up to the rounding of a long sum of positive numbers, and the exact count.
fn sum_and_count(seen: &Seen) -> Result<(), String> {
    const ROUNDING: f64 = 1e-5;
    let (got, want) = (seen.got, seen.want);
    if (got[0] - want[0]).abs() > ROUNDING * want[0] || got[0].is_nan() {
        return Err(format!("{}: the sum is {:e}, wanted {:e}", seen.what, got[0], want[0]));
    }
    if got[1] != want[1] {
        return Err(format!("{}: {} values are not finite, wanted {}", seen.what, got[1], want[1]));
    }
    Ok(())
}

fn sum_squares_case(n: usize, bad: bool) -> Case {
    Case::new(
        format!("[{n}]{}", if bad { ", some not finite" } else { "" }),
        move |d| {
            let mut x = d.normal(n);
            if bad {
                let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
                x.iter_mut().step_by(11).zip(bad.into_iter().cycle()).for_each(|(x, b)| *x = b);
            }
            let start = d.scale * d.scale * n.max(1) as f64;
            vec![acc("x", [n], x), add("out", Type::Acc, [2], vec![start, 3.0], Judge::By(sum_and_count))]
        },
        |dev, v| dev.sum_squares(S, &SumSquares { x: v.input("x"), out: v.acc("out") }),
    )
}

pub fn sum_squares() -> Vec<Case> {
    sizes().flat_map(|(size, n)| [false, true].map(|bad| sum_squares_case(n, bad).from(size))).collect()
}

pub fn sum_squares_sample() -> Case {
    sum_squares_case(5, false)
}

// ---- AdamW ---------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
struct Step {
    n: usize,
    group: usize,
    /// Maximum norm, as a multiple of the gradient's norm; 0: none.
    clip: f64,
    ema: bool,
    shadow: bool,
    /// Number of non-finite values of the gradient.
    bad: f64,
    /// Number of updates so far.
    steps: i32,
}

impl Step {
    fn text(&self) -> String {
        let Step { n, group, clip, ema, shadow, bad, steps } = self;
        let with = |name: &'static str, present: &bool| if *present { name } else { "" };
        let bad = if *bad > 0.0 { format!(", {bad} not finite") } else { String::new() };
        let more = [with(", ema", ema), with(", shadow", shadow)].concat();
        format!("[{n}], group {group}, clip {clip}{more}{bad}, {steps} updates before")
    }

    fn args(&self, d: &Draw) -> Vec<Arg> {
        let (n, scale) = (self.n, d.scale);
        let grad = d.normal(n);
        let norm = crate::common::norm(&grad);
        // NaN except for the slots that the group may read.
        let mut state = vec![f64::NAN; Slot::LEN];
        for (slot, value) in
            [(Slot::Rate(self.group), 0.01 * scale), (Slot::Clip(self.group), self.clip * norm)]
        {
            state[slot.index()] = value;
        }
        // A step on a non-finite gradient changes nothing, not even the last bit.
        let judge = || if self.bad > 0.0 { Judge::Exact } else { near().size(0.1 * scale).into() };
        let squares = |d: &Draw| d.times(scale, n).into_iter().map(|v| v * v).collect::<Vec<_>>();
        let moment = |judge: Judge| match judge {
            Judge::Near(_) => near().size(0.1 * scale * scale).into(),
            other => other,
        };
        let mut args = vec![
            add("master", Type::Acc, [n], d.normal(n), judge()),
            acc("grad", [n], grad),
            add("m", Type::Acc, [n], d.normal(n), judge()),
            add("v", Type::Acc, [n], squares(d), moment(judge())),
            acc("state", [Slot::LEN], state),
            int("steps", vec![self.steps]),
            acc("norm", [2], vec![norm * norm, self.bad]),
        ];
        if self.ema {
            args.push(add("ema", Type::Acc, [n], d.normal(n), judge()));
        }
        if self.shadow {
            args.push(match self.bad > 0.0 {
                true => add("shadow", Type::Act, [n], d.normal(n), Judge::Exact),
                false => out("shadow", Type::Act, [n], judge()),
            });
        }
        args
    }

    fn case(self) -> Case {
        Case::new(
            self.text(),
            move |d| self.args(d),
            move |dev, v| {
                let a = Adamw {
                    master: v.acc("master"),
                    grad: v.input("grad"),
                    m: v.acc("m"),
                    v: v.acc("v"),
                    ema: v.acc_if("ema"),
                    shadow: v.out_if("shadow"),
                    state: v.input("state"),
                    steps: v.input("steps"),
                    norm: v.input("norm"),
                    group: self.group,
                    beta1: 0.9,
                    beta2: 0.95,
                    eps: 1e-8,
                    weight_decay: 0.1,
                    ema_decay: 0.99,
                };
                dev.adamw(S, &a)
            },
        )
    }
}

const STEP: Step = Step { n: 300, group: 2, clip: 0.0, ema: true, shadow: true, bad: 0.0, steps: 2 };

pub fn adamw() -> Vec<Case> {
    let all = sizes().enumerate().map(|(i, (size, n))| {
        let step = Step { n, group: [0, 15, 3][i % 3], clip: [0.0, 0.5, 2.0][i % 3], ..STEP };
        Step { ema: i % 4 != 1, shadow: i % 4 != 3, ..step }.case().from(size)
    });
    let clipped = [Step { clip: 0.1, ..STEP }, Step { clip: 10.0, ema: false, ..STEP }].map(Step::case);
    let counts = [0, 1, 1000, i32::MAX].map(|steps| Step { steps, ..STEP }.case());
    let bad = Step { bad: 2.0, clip: 0.5, ..STEP };
    let bad = [bad, Step { ema: false, shadow: false, bad: 1.0, clip: 0.0, ..bad }];
    all.chain(clipped).chain(counts).chain(bad.map(|s| s.case().named("nothing changes"))).collect()
}

pub fn adamw_sample() -> Case {
    Step { n: 5, clip: 0.5, ..STEP }.case()
}

fn restore_case(n: usize, bad: f64) -> Case {
    Case::new(
        format!("[{n}], {bad} values not finite"),
        move |d| {
            let y = add("y", Type::Act, [n], d.normal(n), Judge::Exact);
            vec![act("x", [n], d.normal(n)), acc("norm", [2], vec![0.5, bad]), y]
        },
        |dev, v| dev.restore(S, &Restore { x: v.input("x"), norm: v.input("norm"), y: v.acc("y") }),
    )
}

pub fn restore() -> Vec<Case> {
    sizes().flat_map(|(size, n)| [0.0, 2.0].map(|bad| restore_case(n, bad).from(size))).collect()
}

pub fn restore_sample() -> Case {
    restore_case(5, 1.0)
}
