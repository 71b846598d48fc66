//! Cross-entropy of a linear layer and of stored logits.

use ett::backend::{LinearXentBwd, LinearXentFwd, Stream, XentBwd, XentFwd};

use super::Size;
use super::case::{Case, Draw, Near, Type, acc, act, add, int, near, out};

const S: Stream = Stream::COMPUTE;

/// Which rows have a target.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Targets {
    /// Two thirds of the rows.
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

/// The data of one run: logits are normal times the run's scale, or times 20 if `peaked`.
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

    /// The error of a logit, a few roundings of its size, is a relative error of its probability.
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
            // Infinite if there is no target, which must not matter.
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
                // Multiplied by the scale: 1.5 for every row.
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

    /// The result of the forward kernel for the backward.
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

// ---- stored logits -------------------------------------------------------------------------------------

/// Logits `[N, V]` that are normal times the run's scale, or times 20 if `peaked`.
#[derive(Clone, Copy)]
struct Stored {
    shape: [usize; 2],
    targets: Targets,
    peaked: bool,
    weighted: bool,
}

impl Stored {
    fn text(&self) -> String {
        format!("[{}, {}]{}", self.shape[0], self.shape[1], if self.weighted { ", weighted" } else { "" })
    }

    /// A problem with the same targets and spread.
    fn problem(&self) -> Problem {
        let [n, v] = self.shape;
        Problem { shape: [n, 1, v], targets: self.targets, peaked: self.peaked }
    }

    /// logits, target, weight and scale.
    fn inputs(&self, d: &Draw) -> Vec<super::case::Arg> {
        let [n, v] = self.shape;
        let target = self.problem().target(d);
        let count = target.iter().filter(|&&t| t >= 0).count();
        let mut args =
            vec![act("logits", [n, v], d.times(self.problem().spread(d), n * v)), int("target", target)];
        if self.weighted {
            args.push(acc("weight", [n], d.unit(n).iter().map(|w| w.abs()).collect()));
        }
        // Infinite if there is no target, which must not matter.
        args.push(acc("scale", [1], vec![1.0 / count as f64]));
        args
    }

    /// The exponent of a logit has an error of one rounding of its size.
    fn near(&self, d: &Draw) -> Near {
        near().conditioning(2.0 + 4.0 * self.problem().spread(d))
    }

    fn fwd(self) -> Case {
        let n = self.shape[0];
        Case::new(
            self.text(),
            move |d| {
                let mut args = self.inputs(d);
                let near = self.near(d).size(self.problem().spread(d).max(1.0));
                args.push(out("lse", Type::Acc, [n], near));
                args.push(add("loss", Type::Acc, [1], vec![0.25], near));
                args
            },
            |dev, v| {
                let a = XentFwd {
                    logits: v.input("logits"),
                    target: v.input("target"),
                    weight: v.input_if("weight"),
                    scale: v.input("scale"),
                    lse: v.out("lse"),
                    loss: v.acc("loss"),
                };
                dev.xent_fwd(S, &a)
            },
        )
    }

    /// If `in_place`, the gradient overwrites the logits.
    fn bwd(self, in_place: bool) -> Case {
        let [n, v] = self.shape;
        Case::new(
            self.text() + if in_place { ", in place" } else { "" },
            move |d| {
                let mut args = self.inputs(d);
                let mut call = args.clone();
                call.push(out("lse", Type::Acc, [n], near()));
                call.push(add("loss", Type::Acc, [1], vec![0.0], near()));
                let lse = d.forward(call, self.fwd().call).remove("lse").expect("a result of the forward");
                let targets = args[1].values().expect("the targets").iter();
                // Multiplied by the scale: 1.5 for every row.
                let g = 1.5 * targets.filter(|&&t| t >= 0.0).count().max(1) as f64;
                args.extend([acc("lse", [n], lse), acc("g", [1], vec![g])]);
                if in_place {
                    let logits = args[0].values().expect("the logits").clone();
                    args[0] = add("logits", Type::Act, [n, v], logits, self.near(d));
                } else {
                    args.push(out("dlogits", Type::Act, [n, v], self.near(d)));
                }
                args
            },
            move |dev, v| {
                let a = XentBwd {
                    logits: v.input("logits"),
                    target: v.input("target"),
                    weight: v.input_if("weight"),
                    scale: v.input("scale"),
                    lse: v.input("lse"),
                    g: v.input("g"),
                    dlogits: v.out(if in_place { "logits" } else { "dlogits" }),
                };
                dev.xent_bwd(S, &a)
            },
        )
    }
}

fn stored(shape: [usize; 2], weighted: bool) -> Stored {
    Stored { shape, targets: Targets::Most, peaked: false, weighted }
}

fn stored_all(of: impl Fn(Stored) -> Case) -> Vec<Case> {
    let small: [[usize; 2]; 8] = [[1, 1], [3, 7], [5, 64], [2, 257], [1, 1031], [33, 16], [2, 900], [0, 5]];
    let large: [[usize; 2]; 4] = [[257, 8193], [131, 151_936], [64, 131_072], [4099, 127]];
    let first = [(Size::Sanitizer, [4, 72]), (Size::Sanitizer, [3, 13])].into_iter();
    let shapes = first.chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s)));
    let mut all: Vec<Case> =
        shapes.enumerate().map(|(i, (size, shape))| of(stored(shape, i % 2 == 0)).from(size)).collect();
    all.push(of(Stored { peaked: true, ..stored([5, 500], true) }).named("peaked"));
    for (targets, name) in [(Targets::None, "no targets"), (Targets::One, "one target")] {
        all.push(of(Stored { targets, ..stored([9, 33], false) }).named(name));
    }
    all
}

pub fn stored_fwd() -> Vec<Case> {
    stored_all(Stored::fwd)
}

pub fn stored_fwd_sample() -> Case {
    stored([3, 5], true).fwd()
}

pub fn stored_bwd() -> Vec<Case> {
    stored_all(|s| s.bwd(false)).into_iter().chain(stored_all(|s| s.bwd(true))).collect()
}

pub fn stored_bwd_sample() -> Case {
    stored([3, 5], true).bwd(false)
}
