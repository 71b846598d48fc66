//! Cross-entropy of a linear layer.

use ett::backend::{LinearXentBwd, LinearXentFwd, Stream};

use super::Size;
use super::case::{Case, Draw, Near, Type, acc, act, add, int, near, out};

const S: Stream = Stream::COMPUTE;

/// Which rows have a target.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Targets {
    /// Two of three.
    Most,
    None,
    One,
}

/// N, C and V.
type Shape = [usize; 3];

fn shapes() -> impl Iterator<Item = (Size, Shape)> {
    let small: [Shape; 12] = [
        [1, 1, 1],
        [3, 8, 1],
        [7, 3, 13],
        [2, 64, 257],
        [31, 33, 65],
        [33, 32, 63],
        [65, 16, 129],
        [64, 128, 128],
        [5, 257, 127],
        [129, 24, 31],
        [4, 40, 2053],
        [0, 8, 5],
    ];
    let large: [Shape; 3] = [[257, 1536, 8193], [131, 256, 151_936], [1031, 127, 4099]];
    let first = [(Size::Sanitizer, [20, 64, 72])].into_iter();
    first.chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s)))
}

/// The problem of one run: logits are normal times the run's scale, or times 20 if `peaked`.
#[derive(Clone, Copy)]
struct Problem {
    shape: Shape,
    targets: Targets,
    peaked: bool,
}

impl Problem {
    fn text(&self) -> String {
        let [n, c, v] = self.shape;
        format!("[{n}, {c}] x [{v}, {c}]")
    }

    fn spread(&self, d: &Draw) -> f64 {
        if self.peaked { 20.0 } else { d.scale }
    }

    /// An error of a logit, some roundings of its size, is a relative error of its probability.
    fn near(&self, d: &Draw) -> Near {
        near().conditioning(2.0 + 4.0 * self.spread(d))
    }

    fn target(&self, d: &Draw) -> Vec<i32> {
        let [n, _, v] = self.shape;
        let mut target = d.ids(n, v);
        for (i, t) in target.iter_mut().enumerate() {
            let supervised = match self.targets {
                Targets::Most => i % 3 != 1,
                Targets::None => false,
                Targets::One => i == n / 2,
            };
            if !supervised {
                *t = -1;
            }
        }
        target
    }

    /// x, w, target and scale.
    fn inputs(&self, d: &Draw) -> Vec<super::case::Arg> {
        let [n, c, v] = self.shape;
        let target = self.target(d);
        let count = target.iter().filter(|&&t| t >= 0).count();
        vec![
            act("x", [n, c], d.times(self.spread(d), n * c)),
            act("w", [v, c], d.times((c as f64).powf(-0.5), v * c)),
            int("target", target),
            // Infinite without a target: it must not matter.
            acc("scale", [1], vec![1.0 / count as f64]),
        ]
    }

    fn fwd(self) -> Case {
        let n = self.shape[0];
        Case::new(
            self.text(),
            move |d| {
                let mut args = self.inputs(d);
                let near = self.near(d).size(self.spread(d).max(1.0));
                args.push(out("lse", Type::Acc, [n], near));
                args.push(out("loss", Type::Acc, [1], near));
                args
            },
            |dev, v| {
                let a = LinearXentFwd {
                    x: v.input("x"),
                    w: v.input("w"),
                    target: v.input("target"),
                    scale: v.input("scale"),
                    lse: v.out("lse"),
                    loss: v.out("loss"),
                };
                dev.linear_xent_fwd(S, &a)
            },
        )
    }

    fn bwd(self, dw: bool) -> Case {
        let [n, c, v] = self.shape;
        Case::new(
            self.text() + if dw { "" } else { ", without dw" },
            move |d| {
                let mut args = self.inputs(d);
                let lse = self.lse(d, &args);
                let targets = args[2].values().expect("the targets").iter();
                // Times the scale, 1.5 for every row.
                let g = 1.5 * targets.filter(|&&t| t >= 0.0).count().max(1) as f64;
                // Gradients of logits may be rounded to act, for tensor cores.
                let near = self.near(d).roundings(1.5).coarse();
                args.extend([
                    acc("lse", [n], lse),
                    acc("g", [1], vec![g]),
                    out("dx", Type::Act, [n, c], near.size((c as f64).powf(-0.5))),
                ]);
                if dw {
                    let size = self.spread(d);
                    args.push(add("dw", Type::Acc, [v, c], d.times(size, v * c), near.size(size)).dense());
                }
                args
            },
            |dev, v| {
                let a = LinearXentBwd {
                    x: v.input("x"),
                    w: v.input("w"),
                    target: v.input("target"),
                    scale: v.input("scale"),
                    lse: v.input("lse"),
                    g: v.input("g"),
                    dx: v.out("dx"),
                    dw: v.acc_if("dw"),
                };
                dev.linear_xent_bwd(S, &a)
            },
        )
    }

    /// What the forward leaves for the backward.
    fn lse(&self, d: &Draw, inputs: &[super::case::Arg]) -> Vec<f64> {
        let mut call = inputs.to_vec();
        call.push(out("lse", Type::Acc, [self.shape[0]], near()));
        call.push(out("loss", Type::Acc, [1], near()));
        let forward = self.fwd().call;
        let mut results = d.forward(call, forward);
        results.remove("lse").expect("a result of the forward")
    }
}

fn problem(shape: Shape) -> Problem {
    Problem { shape, targets: Targets::Most, peaked: false }
}

/// The named cases: logits up to 80 and beyond, few targets.
fn named(of: fn(Problem) -> Case) -> Vec<Case> {
    let shape = [33, 64, 257];
    let peaked = |shape| of(Problem { peaked: true, ..problem(shape) }).named("peaked");
    let mut all = vec![peaked(shape), peaked([5, 40, 2053])];
    for (targets, name) in [(Targets::None, "no targets"), (Targets::One, "one target")] {
        all.push(of(Problem { targets, ..problem(shape) }).named(name));
    }
    all
}

pub fn fwd() -> Vec<Case> {
    let all = shapes().map(|(size, shape)| problem(shape).fwd().from(size));
    all.chain(named(Problem::fwd)).collect()
}

pub fn fwd_sample() -> Case {
    problem([3, 4, 5]).fwd()
}

pub fn bwd() -> Vec<Case> {
    let all = shapes().enumerate().map(|(i, (size, shape))| problem(shape).bwd(i % 4 != 3).from(size));
    all.chain(named(|p| p.bwd(true))).chain(named(|p| p.bwd(false)).into_iter().skip(2)).collect()
}

pub fn bwd_sample() -> Case {
    problem([3, 4, 5]).bwd(true)
}
