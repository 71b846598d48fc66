//! Element types of the CPU kernels and their accumulator types.

use half::bf16;
use num_traits::Float;

use crate::backend::Element;

/// A stored float type with its accumulator type.
pub(crate) trait Elem: Element {
    /// f32 for bf16 and f32, f64 for f64.
    type Acc: Real;
    /// Converts to the accumulator type, exactly.
    fn up(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn down(x: Self::Acc) -> Self;
}

/// An accumulator type.
pub(crate) trait Real:
    Elem<Acc = Self> + Float + std::iter::Sum + std::ops::AddAssign + std::ops::MulAssign
{
    /// Rounds a constant.
    fn of(x: f64) -> Self;
    /// Converts to f64.
    fn wide(self) -> f64;
    /// e^x, in f32 accurate to about 1 ulp and branch-free, so that loops over it vectorise.
    fn fast_exp(self) -> Self;
    /// Error function, accurate to the type's precision.
    fn erf(self) -> Self;
}

impl Elem for f64 {
    type Acc = f64;
    #[inline(always)]
    fn up(self) -> f64 {
        self
    }
    #[inline(always)]
    fn down(x: f64) -> f64 {
        x
    }
}
impl Elem for f32 {
    type Acc = f32;
    #[inline(always)]
    fn up(self) -> f32 {
        self
    }
    #[inline(always)]
    fn down(x: f32) -> f32 {
        x
    }
}
impl Elem for bf16 {
    type Acc = f32;
    #[inline(always)]
    fn up(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn down(x: f32) -> bf16 {
        // As `bf16::from_f32`, without branches, so that loops over it vectorise.
        let x = x.to_bits();
        let rounded = x.wrapping_add(0x7FFF + (x >> 16 & 1)) >> 16;
        let nan = x >> 16 | 0x40;
        bf16::from_bits(if x & 0x7FFF_FFFF > 0x7F80_0000 { nan } else { rounded } as u16)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    fn fast_exp(self) -> f64 {
        self.exp()
    }
    fn erf(self) -> f64 {
        erf_f64(self)
    }
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn fast_exp(self) -> f32 {
        // exp(x) = 2^n exp(r) with r = x - n ln 2 in two parts (Cody and Waite) and exp(r) by its Taylor polynomial
        // on |r| <= ln(2)/2. Below -87.3 the result is 0, above 88.3 it is exp(88.3); NaN stays NaN.
        let x = if self > 88.3 { 88.3 } else { self };
        let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0; // rounds to an integer
        let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
        let p = 1.0 / 5040.0;
        let p = p * r + 1.0 / 720.0;
        let p = p * r + 1.0 / 120.0;
        let p = p * r + 1.0 / 24.0;
        let p = p * r + 1.0 / 6.0;
        let p = p * r + 0.5;
        let p = p * r + 1.0;
        let p = p * r + 1.0;
        // Not `n as i32`: Rust's saturating cast would prevent vectorisation on some targets.
        let clamped = if n < -127.0 { -127.0 } else { n };
        let bits = ((clamped + 12_582_912.0f32).to_bits().wrapping_sub(0x4B40_0000)).wrapping_add(127) << 23;
        let y = p * f32::from_bits(bits);
        if x < -87.3 { 0.0 } else { y }
    }
    #[inline(always)]
    fn erf(self) -> f32 {
        // 1 - exp(polynomial) far from 0, an odd polynomial near 0 (N. Juffa). Both are always computed, so that loops
        // vectorise.
        let (t, s) = (self.abs(), self * self);
        let p = -1.728_534_7e-5 * t + 3.831_971_3e-4;
        let q = -3.883_964_4e-3 * t + 2.425_462_2e-2;
        let p = p * s + q;
        let p = p * t - 1.067_778_8e-1;
        let p = p * t - 6.348_467e-1;
        let p = p * t - 1.287_175_1e-1;
        let far = 1.0 - (p * t - t).fast_exp();
        let p = -5.967_617e-4 * s + 4.991_194_2e-3;
        let p = p * s - 2.676_813_5e-2;
        let p = p * s + 1.128_199_25e-1;
        let p = p * s - 3.761_253_4e-1;
        let p = p * s + 1.283_791_7e-1;
        let near = p * self + self;
        if t > 0.927_734_4 { far.copysign(self) } else { near }
    }
}

/// erf in f64: a power series for |x| < 2, the continued fraction of erfc beyond (Abramowitz and Stegun 7.1.6 and
/// 7.1.14), both with enough terms for full precision.
fn erf_f64(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return f64::NAN;
    }
    if a > 6.0 {
        return x.signum();
    }
    if a < 2.0 {
        // erf x = 2/sqrt(pi) exp(-x^2) sum_n 2^n x^(2n+1) / (2n+1)!!: all terms positive, no cancellation.
        let (mut term, mut sum, mut n) = (a, a, 1.0);
        while term > 1e-17 * sum {
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
            n += 1.0;
        }
        return x.signum() * std::f64::consts::FRAC_2_SQRT_PI * (-a * a).exp() * sum;
    }
    let mut f = a;
    for k in (1..=60).rev() {
        f = a + 0.5 * k as f64 / f;
    }
    x.signum() * (1.0 - (-a * a).exp() / (f * std::f64::consts::PI.sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -8_730_000..8_830_000i64 {
            if i % 97 != 0 {
                continue;
            }
            let x = i as f32 * 1e-5;
            let (got, want) = (x.fast_exp() as f64, (x as f64).exp());
            assert!((got - want).abs() <= 2.4e-7 * want, "exp({x}) = {got}, wanted {want}");
        }
        assert_eq!(0f32.fast_exp(), 1.0);
        assert_eq!(f32::NEG_INFINITY.fast_exp(), 0.0);
        assert_eq!((-1000f32).fast_exp(), 0.0);
        assert!(f32::NAN.fast_exp().is_nan());
    }

    #[test]
    fn f32_erf_is_within_four_ulp() {
        for i in -400_000..400_000 {
            let x = i as f32 * 1.7e-5;
            let (got, want) = (Real::erf(x) as f64, erf_f64(x as f64));
            assert!((got - want).abs() <= 2.4e-7 * want.abs(), "erf({x}) = {got}, wanted {want}");
        }
        assert_eq!([-1e30, f32::INFINITY, 20.0].map(Real::erf), [-1.0, 1.0, 1.0]);
        assert!(Real::erf(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        for i in 0..1u32 << 20 {
            let x = f32::from_bits(i.wrapping_mul(4099));
            assert_eq!(bf16::down(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
        }
        assert_eq!(bf16::down(f32::INFINITY), bf16::INFINITY);
        assert_eq!(bf16::down(f32::MAX), bf16::INFINITY);
    }

    #[test]
    fn erf_matches_known_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, want) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (1.9, 0.992_790_429_235_257_5),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
        ] {
            assert!((erf_f64(x) - want).abs() < 1e-15, "erf({x}) = {}", erf_f64(x));
            assert!((erf_f64(-x) + want).abs() < 1e-15);
        }
    }
}
