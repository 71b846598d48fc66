//! Reconstruction, perceptual and adversarial losses.

use ett::backend::{
    GanGeneratorBwd, GanGeneratorFwd, HingeBwd, HingeFwd, L1Bwd, L1Fwd, LecamBwd, LecamFwd, LecamUpdate,
    LpipsBwd, LpipsFwd, Stream,
};

use super::Size;
use super::case::{Arg, Case, Draw, Near, Type, acc, act, add, near, out};

const S: Stream = Stream::COMPUTE;

/// Rows and columns.
const SMALL: [[usize; 2]; 8] = [[1, 1], [3, 7], [5, 8], [1, 255], [9, 33], [2, 264], [33, 16], [0, 8]];
const LARGE: [[usize; 2]; 4] = [[64, 12_288], [1031, 127], [1, 3_145_729], [8, 900]];

fn shapes() -> impl Iterator<Item = (Size, [usize; 2])> {
    let first = [[20, 64], [12, 13]].map(|s| (Size::Sanitizer, s));
    let small = SMALL.map(|s| (Size::Tiny, s));
    first.into_iter().chain(small).chain(LARGE.map(|s| (Size::Full, s)))
}

fn text([n, c]: [usize; 2]) -> String {
    format!("[{n}, {c}]")
}

/// The reciprocal of the number of elements.
fn mean(n: usize) -> f64 {
    1.0 / n.max(1) as f64
}

/// A loss that already has a value.
fn loss(near: Near) -> Arg {
    add("loss", Type::Acc, [1], vec![0.25], near)
}

/// The factor of the sum, and the gradient of the loss, such that their product is 1.5.
fn scale_and_g(scale: f64) -> [Arg; 2] {
    [acc("scale", [1], vec![scale]), acc("g", [1], vec![1.5 / scale])]
}

// ---- L1 ------------------------------------------------------------------------------------------------

/// `a` and `b`, with equal values at some positions.
fn pair(d: &Draw, dims: [usize; 2]) -> [Arg; 2] {
    let (a, mut b) = (d.normal(dims[0] * dims[1]), d.normal(dims[0] * dims[1]));
    b.iter_mut().zip(&a).step_by(5).for_each(|(b, a)| *b = *a);
    [act("a", dims, a), act("b", dims, b)]
}

fn l1_fwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let scale = acc("scale", [1], vec![mean(dims[0] * dims[1])]);
            pair(d, dims).into_iter().chain([scale, loss(near())]).collect()
        },
        |dev, v| {
            let (a, b) = (v.input("a"), v.input("b"));
            dev.l1_fwd(S, &L1Fwd { a, b, scale: v.input("scale"), loss: v.acc("loss") })
        },
    )
}

pub fn l1_fwd() -> Vec<Case> {
    shapes().map(|(size, shape)| l1_fwd_case(shape).from(size)).collect()
}

pub fn l1_fwd_sample() -> Case {
    l1_fwd_case([3, 4])
}

fn l1_bwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let da = out("da", Type::Act, dims, near());
            pair(d, dims).into_iter().chain(scale_and_g(mean(dims[0] * dims[1]))).chain([da]).collect()
        },
        |dev, v| {
            let (a, b, scale, g) = (v.input("a"), v.input("b"), v.input("scale"), v.input("g"));
            dev.l1_bwd(S, &L1Bwd { a, b, scale, g, da: v.out("da") })
        },
    )
}

pub fn l1_bwd() -> Vec<Case> {
    shapes().map(|(size, shape)| l1_bwd_case(shape).from(size)).collect()
}

pub fn l1_bwd_sample() -> Case {
    l1_bwd_case([3, 4])
}

// ---- LPIPS ---------------------------------------------------------------------------------------------

const LPIPS_EPS: f64 = 1e-10;
const FACTOR: f64 = 0.5;

/// P and C, covering all ways to distribute channels over lanes and chunks.
fn pixels() -> impl Iterator<Item = (Size, [usize; 2])> {
    let first = [[20, 64], [7, 264], [3, 520], [6, 13]].map(|s| (Size::Sanitizer, s));
    let small: [[usize; 2]; 11] =
        [[1, 1], [3, 7], [5, 8], [9, 24], [4, 33], [2, 72], [3, 136], [9, 16], [1, 900], [1, 1032], [0, 8]];
    let large: [[usize; 2]; 6] = [[4099, 64], [8192, 128], [1031, 256], [515, 512], [1000, 100], [77, 2056]];
    first.into_iter().chain(small.map(|s| (Size::Tiny, s))).chain(large.map(|s| (Size::Full, s)))
}

/// Features, with some pixels 0, and weights.
fn features(d: &Draw, [p, c]: [usize; 2]) -> Vec<Arg> {
    let (mut f0, mut f1) = (d.normal(p * c), d.normal(p * c));
    if p > 2 {
        f0[..c].fill(0.0);
        f1[c..2 * c].fill(0.0);
    }
    let w = d.unit(c).iter().map(|w| w.abs()).collect();
    vec![act("f0", [p, c], f0), act("f1", [p, c], f1), act("w", [c], w)]
}

fn lpips_fwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let mut args = features(d, dims);
            args.extend([acc("scale", [1], vec![mean(dims[0])]), loss(near().conditioning(2.0))]);
            args
        },
        |dev, v| {
            let a = LpipsFwd {
                f0: v.input("f0"),
                f1: v.input("f1"),
                w: v.input("w"),
                scale: v.input("scale"),
                loss: v.acc("loss"),
                eps: LPIPS_EPS,
                factor: FACTOR,
            };
            dev.lpips_fwd(S, &a)
        },
    )
}

pub fn lpips_fwd() -> Vec<Case> {
    pixels().map(|(size, shape)| lpips_fwd_case(shape).from(size)).collect()
}

pub fn lpips_fwd_sample() -> Case {
    lpips_fwd_case([3, 4])
}

fn lpips_bwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let mut args = features(d, dims);
            args.extend(scale_and_g(mean(dims[0])));
            // The gradient of a unit vector: the part along the features cancels, which is all of it for a single
            // channel.
            let size = 1.0 / (d.scale * dims[1] as f64);
            args.push(out("df1", Type::Act, dims, near().size(size).conditioning(4.0)));
            args
        },
        |dev, v| {
            let a = LpipsBwd {
                f0: v.input("f0"),
                f1: v.input("f1"),
                w: v.input("w"),
                scale: v.input("scale"),
                g: v.input("g"),
                df1: v.out("df1"),
                eps: LPIPS_EPS,
                factor: FACTOR,
            };
            dev.lpips_bwd(S, &a)
        },
    )
}

pub fn lpips_bwd() -> Vec<Case> {
    pixels().map(|(size, shape)| lpips_bwd_case(shape).from(size)).collect()
}

pub fn lpips_bwd_sample() -> Case {
    lpips_bwd_case([3, 4])
}

// ---- adversarial losses --------------------------------------------------------------------------------

/// The error of a mean logit is a relative error of the results.
fn of_means(d: &Draw) -> Near {
    near().conditioning(2.0 + 4.0 * d.scale)
}

fn generator_fwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let x = act("x", dims, d.normal(dims[0] * dims[1]));
            vec![x, acc("scale", [1], vec![mean(dims[0])]), loss(of_means(d))]
        },
        |dev, v| {
            let (x, scale) = (v.input("x"), v.input("scale"));
            dev.gan_generator_fwd(S, &GanGeneratorFwd { x, scale, loss: v.acc("loss") })
        },
    )
}

pub fn generator_fwd() -> Vec<Case> {
    shapes().map(|(size, shape)| generator_fwd_case(shape).from(size)).collect()
}

pub fn generator_fwd_sample() -> Case {
    generator_fwd_case([3, 4])
}

fn generator_bwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let x = act("x", dims, d.normal(dims[0] * dims[1]));
            let dx = out("dx", Type::Act, dims, of_means(d));
            [x].into_iter().chain(scale_and_g(mean(dims[0]))).chain([dx]).collect()
        },
        |dev, v| {
            let (x, scale, g) = (v.input("x"), v.input("scale"), v.input("g"));
            dev.gan_generator_bwd(S, &GanGeneratorBwd { x, scale, g, dx: v.out("dx") })
        },
    )
}

pub fn generator_bwd() -> Vec<Case> {
    shapes().map(|(size, shape)| generator_bwd_case(shape).from(size)).collect()
}

pub fn generator_bwd_sample() -> Case {
    generator_bwd_case([3, 4])
}

fn hinge_fwd_case(dims: [usize; 2], real: bool) -> Case {
    Case::new(
        format!("{}, real {real}", text(dims)),
        move |d| {
            let x = act("x", dims, d.normal(dims[0] * dims[1]));
            vec![x, acc("scale", [1], vec![mean(dims[0] * dims[1])]), loss(near())]
        },
        move |dev, v| {
            let (x, scale) = (v.input("x"), v.input("scale"));
            dev.hinge_fwd(S, &HingeFwd { x, scale, loss: v.acc("loss"), real, factor: FACTOR })
        },
    )
}

pub fn hinge_fwd() -> Vec<Case> {
    shapes().enumerate().map(|(i, (size, shape))| hinge_fwd_case(shape, i % 2 == 0).from(size)).collect()
}

pub fn hinge_fwd_sample() -> Case {
    hinge_fwd_case([3, 4], true)
}

fn hinge_bwd_case(dims: [usize; 2], real: bool) -> Case {
    Case::new(
        format!("{}, real {real}", text(dims)),
        move |d| {
            let mut x = d.normal(dims[0] * dims[1]);
            // At the kink there is no gradient.
            x.iter_mut().step_by(7).for_each(|x| *x = if real { 1.0 } else { -1.0 });
            let dx = out("dx", Type::Act, dims, near());
            [act("x", dims, x)].into_iter().chain(scale_and_g(mean(dims[0] * dims[1]))).chain([dx]).collect()
        },
        move |dev, v| {
            let (x, scale, g) = (v.input("x"), v.input("scale"), v.input("g"));
            dev.hinge_bwd(S, &HingeBwd { x, scale, g, dx: v.out("dx"), real, factor: FACTOR })
        },
    )
}

pub fn hinge_bwd() -> Vec<Case> {
    shapes().enumerate().map(|(i, (size, shape))| hinge_bwd_case(shape, i % 2 == 0).from(size)).collect()
}

pub fn hinge_bwd_sample() -> Case {
    hinge_bwd_case([3, 4], false)
}

// ---- LeCAM ---------------------------------------------------------------------------------------------

/// Real and fake logits of different shapes, and their averages.
fn logits(d: &Draw, dims: [usize; 2]) -> Vec<Arg> {
    let [n, c] = dims;
    let fake = [n + 1, c];
    vec![
        act("real", dims, d.normal(n * c)),
        act("fake", fake, d.normal((n + 1) * c)),
        acc("ema", [2], d.times(0.3 * d.scale, 2)),
    ]
}

/// `bad`: a non-finite value for one of the real logits.
fn lecam_update_case(dims: [usize; 2], bad: Option<f64>) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let mut args = logits(d, dims);
            if let (Some(bad), super::case::Content::In(real)) = (bad, &mut args[0].content) {
                real[dims[0] * dims[1] / 2] = bad;
            }
            // Means may cancel.
            args.push(out("out", Type::Acc, [2], near().size(d.scale)));
            args
        },
        |dev, v| {
            let (real, fake, ema) = (v.input("real"), v.input("fake"), v.input("ema"));
            dev.lecam_update(S, &LecamUpdate { real, fake, ema, out: v.out("out"), decay: 0.9 })
        },
    )
}

pub fn lecam_update() -> Vec<Case> {
    let some = |(_, [n, c]): &(Size, [usize; 2])| n * c > 0;
    let all = shapes().filter(some).map(|(size, shape)| lecam_update_case(shape, None).from(size));
    let bad = |v: f64| lecam_update_case([5, 8], Some(v)).named(&format!("{v} among them"));
    all.chain([bad(f64::NAN), bad(f64::INFINITY)]).collect()
}

pub fn lecam_update_sample() -> Case {
    lecam_update_case([3, 5], None)
}

fn lecam_fwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let mut args = logits(d, dims);
            args.extend([acc("scale", [1], vec![mean(dims[0] * dims[1])]), loss(near())]);
            args
        },
        |dev, v| {
            let (real, fake, ema, scale) =
                (v.input("real"), v.input("fake"), v.input("ema"), v.input("scale"));
            dev.lecam_fwd(S, &LecamFwd { real, fake, ema, scale, loss: v.acc("loss") })
        },
    )
}

pub fn lecam_fwd() -> Vec<Case> {
    shapes().map(|(size, shape)| lecam_fwd_case(shape).from(size)).collect()
}

pub fn lecam_fwd_sample() -> Case {
    lecam_fwd_case([3, 5])
}

fn lecam_bwd_case(dims: [usize; 2]) -> Case {
    Case::new(
        text(dims),
        move |d| {
            let mut args = logits(d, dims);
            args.extend(scale_and_g(mean(dims[0] * dims[1])));
            // A logit may be close to the average.
            let near = near().size(d.scale);
            args.push(out("dreal", Type::Act, dims, near));
            args.push(out("dfake", Type::Act, [dims[0] + 1, dims[1]], near));
            args
        },
        |dev, v| {
            let a = LecamBwd {
                real: v.input("real"),
                fake: v.input("fake"),
                ema: v.input("ema"),
                scale: v.input("scale"),
                g: v.input("g"),
                dreal: v.out("dreal"),
                dfake: v.out("dfake"),
            };
            dev.lecam_bwd(S, &a)
        },
    )
}

pub fn lecam_bwd() -> Vec<Case> {
    shapes().map(|(size, shape)| lecam_bwd_case(shape).from(size)).collect()
}

pub fn lecam_bwd_sample() -> Case {
    lecam_bwd_case([3, 5])
}
