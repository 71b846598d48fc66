//! Reconstruction, perceptual and adversarial losses.

use num_traits::{Float, One, Zero};
use rayon::prelude::*;

use super::workspace::no_workspace;
use super::*;

no_workspace!(
    l1_fwd(L1Fwd),
    l1_bwd(L1Bwd),
    lpips_fwd(LpipsFwd),
    lpips_bwd(LpipsBwd),
    gan_generator_fwd(GanGeneratorFwd),
    gan_generator_bwd(GanGeneratorBwd),
    hinge_fwd(HingeFwd),
    hinge_bwd(HingeBwd),
    lecam_update(LecamUpdate),
    lecam_fwd(LecamFwd),
    lecam_bwd(LecamBwd)
);

/// Elements that one task handles.
const CHUNK: usize = 16384;

macro_rules! by_act {
    ($($name:ident($args:ident) by $arg:ident => $f:ident;)*) => {
        $(pub(super) fn $name(_ws: &Workspace, a: &$args) -> Result<()> {
            by_dtype!(stringify!($name), a.$arg.dtype, E => $f::<E>(stringify!($name), a))
        })*
    };
}
by_act! {
    l1_fwd(L1Fwd) by a => l1;
    l1_bwd(L1Bwd) by a => l1_grad;
    lpips_fwd(LpipsFwd) by f1 => lpips;
    lpips_bwd(LpipsBwd) by f1 => lpips_grad;
    gan_generator_fwd(GanGeneratorFwd) by x => generator;
    gan_generator_bwd(GanGeneratorBwd) by x => generator_grad;
    hinge_fwd(HingeFwd) by x => hinge;
    hinge_bwd(HingeBwd) by x => hinge_grad;
    lecam_update(LecamUpdate) by real => lecam_averages;
    lecam_fwd(LecamFwd) by real => lecam;
    lecam_bwd(LecamBwd) by real => lecam_grad;
}

/// Adds to a loss.
fn add_loss<R: Real>(op: &'static str, loss: &Acc, value: R) -> Result<()> {
    expect(op, "loss", &loss.0, 1)?;
    flat_mut::<R>(op, "loss", &loss.0)?[0] += value;
    Ok(())
}

/// A contiguous input with as many elements as another argument.
fn like<'a, E: Elem>(op: &'static str, arg: &'static str, v: &In<'a>, n: usize) -> Result<&'a [E]> {
    expect(op, arg, v, n)?;
    flat(op, arg, v)
}

/// Sum of `f` over all elements.
fn total<E: Elem>(x: &[E], f: impl Fn(E::Acc) -> E::Acc + Sync) -> E::Acc {
    par_sum(x.len(), CHUNK, |r| lanes::sum(&x[r], |x: E| f(x.up())))
}

/// Mean of `f` over all elements, of which there must be some.
fn mean<E: Elem>(
    op: &'static str,
    arg: &'static str,
    x: &[E],
    f: impl Fn(E::Acc) -> E::Acc + Sync,
) -> Result<E::Acc> {
    if x.is_empty() {
        return Err(Error::arg(op, arg, "empty", "at least one element to average"));
    }
    Ok(total(x, f) / E::Acc::of(x.len() as f64))
}

/// `y = f(x)` in parallel.
fn map<E: Elem>(y: &mut [E], x: &[E], f: impl Fn(E::Acc) -> E::Acc + Sync) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = E::down(f(x.up()));
        }
    });
}

/// max(x, 0); NaN stays NaN.
fn relu<R: Real>(x: R) -> R {
    if x < R::zero() { R::zero() } else { x }
}

// ---- L1 ------------------------------------------------------------------------------------------------

fn l1<E: Elem>(op: &'static str, a: &L1Fwd) -> Result<()> {
    let x = flat::<E>(op, "a", &a.a)?;
    let y = like::<E>(op, "b", &a.b, x.len())?;
    let sum =
        par_sum(x.len(), CHUNK, |r| lanes::sum2(&x[r.clone()], &y[r], |x: E, y: E| (x.up() - y.up()).abs()));
    add_loss(op, &a.loss, scalar::<E::Acc>(op, "scale", &a.scale)? * sum)
}

fn l1_grad<E: Elem>(op: &'static str, a: &L1Bwd) -> Result<()> {
    let x = flat::<E>(op, "a", &a.a)?;
    let y = like::<E>(op, "b", &a.b, x.len())?;
    expect(op, "da", &a.da.0, x.len())?;
    let da = flat_mut::<E>(op, "da", &a.da.0)?;
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scalar::<E::Acc>(op, "scale", &a.scale)?;
    da.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK))).for_each(|(da, (x, y))| {
        for ((da, &x), &y) in da.iter_mut().zip(x).zip(y) {
            *da = E::down(g * sign(x.up() - y.up()));
        }
    });
    Ok(())
}

/// The sign, 0 for 0; NaN stays NaN.
fn sign<R: Real>(d: R) -> R {
    if d > R::zero() {
        R::one()
    } else if d < R::zero() {
        -R::one()
    } else {
        d
    }
}

// ---- LPIPS ---------------------------------------------------------------------------------------------

/// Pixels that one task handles.
fn pixels(cols: usize) -> usize {
    CHUNK.div_ceil(cols.max(1))
}

struct Features<'a, E: Elem> {
    f0: Rows<'a, E>,
    f1: Rows<'a, E>,
    /// The weights, widened.
    w: Vec<E::Acc>,
    eps: E::Acc,
}

/// One over the padded norm of a pixel's features, and the norm.
#[inline(always)]
fn inverse_norm<E: Elem>(f: &[E], eps: E::Acc) -> (E::Acc, E::Acc) {
    let norm = lanes::sum(f, |x: E| x.up() * x.up()).sqrt();
    (E::Acc::one() / (norm + eps), norm)
}

impl<'a, E: Elem> Features<'a, E> {
    fn new(op: &'static str, f0: &In<'a>, f1: &In<'a>, w: &In<'a>, eps: f64) -> Result<Self> {
        let x = rows::<E>(op, "f0", f0)?;
        expect_rows(op, "f1", f1, x.rows, x.cols)?;
        let w = like::<E>(op, "w", w, x.cols)?.iter().map(|w| w.up()).collect();
        Ok(Features { f0: x, f1: rows(op, "f1", f1)?, w, eps: E::Acc::of(eps) })
    }

    /// The weighted squared difference of one pixel.
    fn distance(&self, p: usize) -> E::Acc {
        let (f0, f1) = (self.f0.row(p), self.f1.row(p));
        let ((s0, _), (s1, _)) = (inverse_norm(f0, self.eps), inverse_norm(f1, self.eps));
        lanes::sum3(f0, f1, &self.w, |x: E, y: E, w| {
            let d = x.up() * s0 - y.up() * s1;
            w * d * d
        })
    }

    /// Gradient of one pixel for `f1`. With `t = dloss/dn1`, `n1 = f1 / (|f1| + eps)`:
    /// `df1 = (t - n1 (t . f1) / |f1|) / (|f1| + eps)`.
    fn gradient(&self, p: usize, g: E::Acc, df1: &mut [E], t: &mut [E::Acc]) {
        let (f0, f1) = (self.f0.row(p), self.f1.row(p));
        let ((s0, _), (s1, norm)) = (inverse_norm(f0, self.eps), inverse_norm(f1, self.eps));
        if norm == E::Acc::zero() {
            df1.fill(E::zeroed());
            return;
        }
        for (((t, &x), &y), &w) in t.iter_mut().zip(f0).zip(f1).zip(&self.w) {
            *t = g * w * (y.up() * s1 - x.up() * s0);
        }
        let along = lanes::sum2(t, f1, |t, y: E| t * y.up()) / norm;
        for ((d, &t), &y) in df1.iter_mut().zip(t.iter()).zip(f1) {
            *d = E::down((t - y.up() * s1 * along) * s1);
        }
    }
}

fn lpips<E: Elem>(op: &'static str, a: &LpipsFwd) -> Result<()> {
    let f = Features::<E>::new(op, &a.f0, &a.f1, &a.w, a.eps)?;
    let sum = par_sum(f.f0.rows, pixels(f.f0.cols), |r| r.map(|p| f.distance(p)).sum());
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(a.factor);
    add_loss(op, &a.loss, scale * sum)
}

fn lpips_grad<E: Elem>(op: &'static str, a: &LpipsBwd) -> Result<()> {
    let f = Features::<E>::new(op, &a.f0, &a.f1, &a.w, a.eps)?;
    expect_rows(op, "df1", &a.df1.0, f.f1.rows, f.f1.cols)?;
    let df1 = rows_mut::<E>(op, "df1", &a.df1.0)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(2.0 * a.factor);
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scale;
    par_for(df1.rows, pixels(df1.cols), |r| {
        let mut t = vec![E::Acc::zero(); f.w.len()];
        for p in r {
            // SAFETY: chunks do not overlap: one thread a row.
            let df1 = unsafe { df1.row(p) };
            f.gradient(p, g, df1, &mut t);
        }
    });
    Ok(())
}

// ---- adversarial losses --------------------------------------------------------------------------------

/// Minus the mean logit of each image.
fn minus_means<E: Elem>(op: &'static str, x: &In) -> Result<Vec<E::Acc>> {
    let x = rows::<E>(op, "x", x)?;
    (0..x.rows).map(|b| mean(op, "x", x.row(b), |v| v).map(|m| -m)).collect()
}

fn softplus<R: Real>(x: R) -> R {
    relu(x) + (-x.abs()).exp().ln_1p()
}

fn sigmoid<R: Real>(x: R) -> R {
    let e = (-x.abs()).exp();
    (if x < R::zero() { e } else { R::one() }) / (R::one() + e)
}

fn generator<E: Elem>(op: &'static str, a: &GanGeneratorFwd) -> Result<()> {
    let sum: E::Acc = minus_means::<E>(op, &a.x)?.into_iter().map(softplus).sum();
    add_loss(op, &a.loss, scalar::<E::Acc>(op, "scale", &a.scale)? * sum)
}

fn generator_grad<E: Elem>(op: &'static str, a: &GanGeneratorBwd) -> Result<()> {
    let means = minus_means::<E>(op, &a.x)?;
    expect_rows(op, "dx", &a.dx.0, a.x.dims.rows(), a.x.dims.cols())?;
    let dx = rows_mut::<E>(op, "dx", &a.dx.0)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? / E::Acc::of(dx.cols as f64);
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scale;
    par_for(dx.rows, 1, |r| {
        for b in r {
            // SAFETY: chunks do not overlap: one thread a row.
            unsafe { dx.row(b) }.fill(E::down(-g * sigmoid(means[b])));
        }
    });
    Ok(())
}

/// Real logits are wanted above 1, fake ones below -1: `relu(1 + side * x)`.
fn side<R: Real>(real: bool) -> R {
    if real { -R::one() } else { R::one() }
}

fn hinge<E: Elem>(op: &'static str, a: &HingeFwd) -> Result<()> {
    let x = flat::<E>(op, "x", &a.x)?;
    let side = side::<E::Acc>(a.real);
    let sum = total(x, |x| relu(E::Acc::one() + side * x));
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(a.factor);
    add_loss(op, &a.loss, scale * sum)
}

fn hinge_grad<E: Elem>(op: &'static str, a: &HingeBwd) -> Result<()> {
    let x = flat::<E>(op, "x", &a.x)?;
    expect(op, "dx", &a.dx.0, x.len())?;
    let dx = flat_mut::<E>(op, "dx", &a.dx.0)?;
    let side = side::<E::Acc>(a.real);
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(a.factor);
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scale * side;
    let (zero, one) = (E::Acc::zero(), E::Acc::one());
    map(dx, x, |x| if one + side * x > zero { g } else { zero });
    Ok(())
}

fn lecam_averages<E: Elem>(op: &'static str, a: &LecamUpdate) -> Result<()> {
    let real = mean(op, "real", flat::<E>(op, "real", &a.real)?, |x| x)?;
    let fake = mean(op, "fake", flat::<E>(op, "fake", &a.fake)?, |x| x)?;
    let ema = like::<E::Acc>(op, "ema", &a.ema, 2)?;
    expect(op, "out", &a.out.0, 2)?;
    let out = flat_mut::<E::Acc>(op, "out", &a.out.0)?;
    let (decay, rest) = (E::Acc::of(a.decay), E::Acc::of(1.0 - a.decay));
    for (out, (&old, new)) in out.iter_mut().zip(ema.iter().zip([real, fake])) {
        *out = if new.is_finite() { decay * old + rest * new } else { old };
    }
    Ok(())
}

fn lecam<E: Elem>(op: &'static str, a: &LecamFwd) -> Result<()> {
    let ema = like::<E::Acc>(op, "ema", &a.ema, 2)?;
    let sq = |x: E::Acc| relu(x) * relu(x);
    let real = total(flat::<E>(op, "real", &a.real)?, |x| sq(x - ema[1]));
    let fake = total(flat::<E>(op, "fake", &a.fake)?, |x| sq(ema[0] - x));
    add_loss(op, &a.loss, scalar::<E::Acc>(op, "scale", &a.scale)? * (real + fake))
}

fn lecam_grad<E: Elem>(op: &'static str, a: &LecamBwd) -> Result<()> {
    let (real, fake) = (flat::<E>(op, "real", &a.real)?, flat::<E>(op, "fake", &a.fake)?);
    let ema = like::<E::Acc>(op, "ema", &a.ema, 2)?;
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(2.0);
    expect(op, "dreal", &a.dreal.0, real.len())?;
    expect(op, "dfake", &a.dfake.0, fake.len())?;
    let (dreal, dfake) = (flat_mut::<E>(op, "dreal", &a.dreal.0)?, flat_mut::<E>(op, "dfake", &a.dfake.0)?);
    map(dreal, real, |x| g * relu(x - ema[1]));
    map(dfake, fake, |x| -g * relu(ema[0] - x));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing_b::*;
    use super::*;

    const SIZES: [(usize, usize); 4] = [(1, 1), (3, 7), (131, 64), (2, CHUNK + 3)];
    const SCALE: f64 = 0.3;

    fn read_loss(dev: &Cpu, loss: &Tensor) -> Result<f64> {
        Ok(loss.to_f64(dev)?[0])
    }

    /// Moves values away from a kink that finite differences would straddle.
    fn clear_of(kink: f64, mut v: Vec<f64>) -> Vec<f64> {
        v.iter_mut().filter(|x| (**x - kink).abs() < 0.01).for_each(|x| *x = kink + 0.02);
        v
    }

    /// Checks a loss and its gradients for `wrt` at all sizes; gradients of large ones against f64 only.
    /// The last three arguments are the loss, which has a value already, the gradient it receives, and the scale.
    fn check_loss(
        args: impl Fn(usize, usize) -> Vec<Arg>,
        wrt: &[usize],
        naive: impl Fn(&[Vec<f64>], usize) -> f64,
        fwd: impl Fn(&Cpu, &[Tensor], Acc) -> Result<()>,
        bwd: impl Fn(&Cpu, &[Tensor], &[Tensor]) -> Result<()>,
    ) {
        for (p, c) in SIZES {
            let mut args = args(p, c);
            let at = args.len();
            args.extend([acc([1], vec![0.25]), acc([1], vec![1.7]), acc([1], vec![SCALE])]);
            let run = |dev: &Cpu, _: Precision, t: &[Tensor]| {
                fwd(dev, t, t[at].acc())?;
                Ok(vec![t[at].clone()])
            };
            check(&args, |v| vec![vec![0.25 + naive(v, c)]], run);
            let grads = |dev: &Cpu, t: &[Tensor]| {
                let d: Vec<Tensor> = wrt.iter().map(|&i| out(dev, t[i].dtype(), t[i].dims())).collect();
                bwd(dev, t, &d)?;
                Ok(d)
            };
            check_self(&args, |dev, _, t| grads(dev, t));
            if p * c < 100 {
                let loss = |dev: &Cpu, t: &[Tensor]| {
                    fwd(dev, t, t[at].acc())?;
                    Ok(1.7 * read_loss(dev, &t[at])?)
                };
                check_grad(&args, wrt, loss, grads);
            }
        }
    }

    #[test]
    fn l1_and_its_gradient() {
        check_loss(
            |p, c| {
                let b = normal(2, p * c);
                let d = clear_of(0.0, normal(1, p * c));
                vec![act([p, c], b.iter().zip(d).map(|(b, d)| b + d).collect()), act([p, c], b)]
            },
            &[0],
            |v, _| SCALE * v[0].iter().zip(&v[1]).map(|(a, b)| (a - b).abs()).sum::<f64>(),
            |dev, t, loss| {
                let (a, b, scale) = (t[0].view(), t[1].view(), t[4].view());
                dev.l1_fwd(S, &L1Fwd { a, b, scale, loss })
            },
            |dev, t, d| {
                let (a, b, g, scale) = (t[0].view(), t[1].view(), t[3].view(), t[4].view());
                dev.l1_bwd(S, &L1Bwd { a, b, scale, g, da: d[0].out() })
            },
        );
    }

    #[test]
    fn l1_has_no_gradient_where_equal() {
        let dev = Cpu::poisoned(1).unwrap();
        let t = tensors(&dev, Precision::F32, &[act([3], vec![1.0, -0.0, 2.0]), acc([1], vec![1.0])]);
        let da = out(&dev, DType::F32, [3]);
        let (x, g) = (t[0].view(), t[1].view());
        dev.l1_bwd(S, &L1Bwd { a: x, b: x, scale: g, g, da: da.out() }).unwrap();
        assert_eq!(da.to_f64(&dev).unwrap(), [0.0; 3]);
    }

    #[test]
    fn lpips_and_its_gradient() {
        // Large, so that the one channel of the smallest case has a gradient.
        const EPS: f64 = 0.05;
        check_loss(
            |p, c| {
                let w = normal(3, c).into_iter().map(f64::abs).collect();
                vec![act([p, c], normal(1, p * c)), act([p, c], normal(2, p * c)), act([c], w)]
            },
            &[1],
            |v, c| {
                let pixel = |(f0, f1): (&[f64], &[f64])| {
                    let norm = |f: &[f64]| f.iter().map(|x| x * x).sum::<f64>().sqrt() + EPS;
                    let (n0, n1) = (norm(f0), norm(f1));
                    (0..c).map(|i| v[2][i] * (f0[i] / n0 - f1[i] / n1).powi(2)).sum::<f64>()
                };
                0.5 * SCALE * v[0].chunks(c).zip(v[1].chunks(c)).map(pixel).sum::<f64>()
            },
            |dev, t, loss| {
                let (f0, f1, w, scale) = (t[0].view(), t[1].view(), t[2].view(), t[5].view());
                dev.lpips_fwd(S, &LpipsFwd { f0, f1, w, scale, loss, eps: EPS, factor: 0.5 })
            },
            |dev, t, d| {
                let (f0, f1, w) = (t[0].view(), t[1].view(), t[2].view());
                let (g, scale, df1) = (t[4].view(), t[5].view(), d[0].out());
                dev.lpips_bwd(S, &LpipsBwd { f0, f1, w, scale, g, df1, eps: EPS, factor: 0.5 })
            },
        );
    }

    #[test]
    fn lpips_has_no_gradient_where_all_features_are_zero() {
        let dev = Cpu::poisoned(1).unwrap();
        let args = [
            act([2, 3], normal(1, 6)),
            act([2, 3], vec![0.0; 6]),
            act([3], vec![1.0; 3]),
            acc([1], vec![1.0]),
        ];
        let t = tensors(&dev, Precision::F32, &args);
        let df1 = out(&dev, DType::F32, [2, 3]);
        let (f0, f1, w, g) = (t[0].view(), t[1].view(), t[2].view(), t[3].view());
        let a = LpipsBwd { f0, f1, w, scale: g, g, df1: df1.out(), eps: 1e-10, factor: 1.0 };
        dev.lpips_bwd(S, &a).unwrap();
        assert_eq!(df1.to_f64(&dev).unwrap(), [0.0; 6]);
    }

    #[test]
    fn generator_and_its_gradient() {
        check_loss(
            |p, c| vec![act([p, c], normal(1, p * c).into_iter().map(|x| x - 0.5).collect())],
            &[0],
            |v, c| {
                let image = |x: &[f64]| (1.0 + (-x.iter().sum::<f64>() / c as f64).exp()).ln();
                SCALE * v[0].chunks(c).map(image).sum::<f64>()
            },
            |dev, t, loss| {
                dev.gan_generator_fwd(S, &GanGeneratorFwd { x: t[0].view(), scale: t[3].view(), loss })
            },
            |dev, t, d| {
                let (x, g, scale) = (t[0].view(), t[2].view(), t[3].view());
                dev.gan_generator_bwd(S, &GanGeneratorBwd { x, scale, g, dx: d[0].out() })
            },
        );
    }

    #[test]
    fn generator_is_stable_far_out() {
        for (far, want, slope) in [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)] {
            let dev = Cpu::poisoned(1).unwrap();
            let t = tensors(
                &dev,
                Precision::F32,
                &[act([1, 1], vec![far]), acc([1], vec![0.0]), acc([1], vec![1.0])],
            );
            let dx = out(&dev, DType::F32, [1, 1]);
            let (x, one) = (t[0].view(), t[2].view());
            dev.gan_generator_fwd(S, &GanGeneratorFwd { x, scale: one, loss: t[1].acc() }).unwrap();
            let a = GanGeneratorBwd { x, scale: one, g: one, dx: dx.out() };
            dev.gan_generator_bwd(S, &a).unwrap();
            assert_eq!(read_loss(&dev, &t[1]).unwrap(), want);
            assert_eq!(read_loss(&dev, &dx).unwrap(), slope);
        }
    }

    #[test]
    fn hinge_and_its_gradient() {
        for real in [true, false] {
            let sign = if real { -1.0 } else { 1.0 };
            check_loss(
                |p, c| vec![act([p, c], clear_of(-sign, normal(1, p * c)))],
                &[0],
                |v, _| 0.5 * SCALE * v[0].iter().map(|x| (1.0 + sign * x).max(0.0)).sum::<f64>(),
                |dev, t, loss| {
                    let (x, scale) = (t[0].view(), t[3].view());
                    dev.hinge_fwd(S, &HingeFwd { x, scale, loss, real, factor: 0.5 })
                },
                |dev, t, d| {
                    let (x, g, scale) = (t[0].view(), t[2].view(), t[3].view());
                    dev.hinge_bwd(S, &HingeBwd { x, scale, g, dx: d[0].out(), real, factor: 0.5 })
                },
            );
        }
    }

    #[test]
    fn lecam_and_its_gradient() {
        check_loss(
            |p, c| {
                let (real, fake) = (clear_of(-0.3, normal(1, p * c)), clear_of(0.4, normal(2, p * (c + 1))));
                vec![act([p, c], real), act([p, c + 1], fake), acc([2], vec![0.4, -0.3])]
            },
            &[0, 1],
            |v, _| {
                let sum =
                    |v: &[f64], f: &dyn Fn(f64) -> f64| v.iter().map(|&x| f(x).max(0.0).powi(2)).sum::<f64>();
                SCALE * (sum(&v[0], &|x| x - v[2][1]) + sum(&v[1], &|x| v[2][0] - x))
            },
            |dev, t, loss| {
                let (real, fake, ema, scale) = (t[0].view(), t[1].view(), t[2].view(), t[5].view());
                dev.lecam_fwd(S, &LecamFwd { real, fake, ema, scale, loss })
            },
            |dev, t, d| {
                let (real, fake, ema) = (t[0].view(), t[1].view(), t[2].view());
                let (g, scale, dreal, dfake) = (t[4].view(), t[5].view(), d[0].out(), d[1].out());
                dev.lecam_bwd(S, &LecamBwd { real, fake, ema, scale, g, dreal, dfake })
            },
        );
    }

    #[test]
    fn lecam_averages_take_in_the_batch() {
        for (p, c) in SIZES {
            let args = [
                act([p, c], normal(1, p * c).into_iter().map(|x| x + 1.0).collect()),
                act([p], normal(2, p).into_iter().map(|x| x - 1.0).collect()),
                acc([2], vec![0.5, -0.25]),
            ];
            let naive = |v: &[Vec<f64>]| {
                let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
                vec![vec![0.9 * v[2][0] + 0.1 * mean(&v[0]), 0.9 * v[2][1] + 0.1 * mean(&v[1])]]
            };
            check(&args, naive, |dev, p, t| {
                let out = out(dev, p.acc, [2]);
                let (real, fake, ema) = (t[0].view(), t[1].view(), t[2].view());
                dev.lecam_update(S, &LecamUpdate { real, fake, ema, out: out.out(), decay: 0.9 })?;
                Ok(vec![out])
            });
        }
    }

    #[test]
    fn lecam_averages_leave_out_what_is_not_finite() {
        let dev = Cpu::poisoned(1).unwrap();
        let args = [act([2], vec![1.0, f64::NAN]), act([2], vec![1.0, 3.0]), acc([2], vec![0.5, -0.5])];
        let t = tensors(&dev, Precision::F64, &args);
        let out = out(&dev, DType::F64, [2]);
        let (real, fake, ema) = (t[0].view(), t[1].view(), t[2].view());
        dev.lecam_update(S, &LecamUpdate { real, fake, ema, out: out.out(), decay: 0.5 }).unwrap();
        assert_eq!(out.to_f64(&dev).unwrap(), [0.5, 0.75]);
    }

    #[test]
    fn shapes_that_differ_are_errors() {
        let dev = Cpu::poisoned(1).unwrap();
        let t = tensors(
            &dev,
            Precision::F32,
            &[act([3], vec![0.0; 3]), act([2], vec![0.0; 2]), acc([1], vec![0.0])],
        );
        let (a, b, scale, loss) = (t[0].view(), t[1].view(), t[2].view(), t[2].acc());
        assert!(dev.l1_fwd(S, &L1Fwd { a, b, scale, loss }).is_err());
        assert!(dev.l1_fwd(S, &L1Fwd { a, b: a, scale, loss: t[1].acc() }).is_err());
        assert!(dev.l1_fwd(S, &L1Fwd { a, b: a, scale: b, loss }).is_err());
        let x = LecamFwd { real: a, fake: b, ema: a, scale, loss };
        assert!(dev.lecam_fwd(S, &x).is_err());
        let none = out(&dev, DType::F32, [0]);
        let out = out(&dev, DType::F32, [2]);
        let x = LecamUpdate { real: none.view(), fake: b, ema: b, out: out.out(), decay: 0.5 };
        assert!(dev.lecam_update(S, &x).is_err());
    }
}
