//! One layer of LPIPS: weighted squared differences of features that are normalised pixel by pixel.

use num_traits::{Float, One, Zero};

use super::sums::{CHUNK, add_loss};
use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(lpips_fwd(LpipsFwd), lpips_bwd(LpipsBwd));

by_act! {
    lpips_fwd(LpipsFwd) by f1 => lpips;
    lpips_bwd(LpipsBwd) by f1 => lpips_grad;
}

/// Number of pixels per task.
fn pixels(cols: usize) -> usize {
    CHUNK.div_ceil(cols.max(1))
}

struct Features<'a, E: Elem> {
    f0: Rows<'a, E>,
    f1: Rows<'a, E>,
    /// The weights in the accumulator type.
    w: Vec<E::Acc>,
    eps: E::Acc,
}

/// `1 / (|f| + eps)` for the features of a pixel, and the norm `|f|`.
#[inline(always)]
fn inverse_norm<E: Elem>(f: &[E], eps: E::Acc) -> (E::Acc, E::Acc) {
    let norm = lanes::sum(f, |x: E| x.up() * x.up()).sqrt();
    (E::Acc::one() / (norm + eps), norm)
}

impl<'a, E: Elem> Features<'a, E> {
    fn new(op: &'static str, f0: &In<'a>, f1: &In<'a>, w: &In<'a>, eps: f64) -> Result<Self> {
        let x = rows::<E>(op, "f0", f0)?;
        let w = flat::<E>(op, "w", w)?.iter().map(|w| w.up()).collect();
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
    let df1 = rows_mut::<E>(op, "df1", &a.df1.0)?;
    let scale = scalar::<E::Acc>(op, "scale", &a.scale)? * E::Acc::of(2.0 * a.factor);
    let g = scalar::<E::Acc>(op, "g", &a.g)? * scale;
    par_for(df1.rows, pixels(df1.cols), |r| {
        let mut t = vec![E::Acc::zero(); f.w.len()];
        for p in r {
            // SAFETY: chunks do not overlap, so that each row belongs to one thread.
            let df1 = unsafe { df1.row(p) };
            f.gradient(p, g, df1, &mut t);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cases::*;
    use super::*;
    use crate::backend::cpu::testing::args::*;

    #[test]
    fn lpips_and_its_gradient() {
        // Large, so that the smallest case, with a single channel, has a gradient.
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
}
