//! Element types and the precision pair of a run.

use half::bf16;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DType {
    /// IEEE binary64, for the reference implementation.
    F64 = 0,
    /// IEEE binary32.
    F32 = 1,
    /// bfloat16, for storage only; sums are in f32.
    Bf16 = 2,
    /// Indices, positions, sequence offsets.
    I32 = 3,
    /// Bytes of pictures.
    U8 = 4,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
            DType::U8 => 1,
        }
    }

    /// Lower-case name as used in configurations and messages.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }

    /// The value stored for `v` in a tensor of this type: floats are rounded to nearest, ties to even; integers are
    /// truncated.
    pub fn rounded(self, v: f64) -> f64 {
        match self {
            DType::F64 => v,
            DType::F32 => f64::from(v as f32),
            DType::Bf16 => to_bf16(v).to_f64(),
            DType::I32 => f64::from(v as i32),
            DType::U8 => f64::from(v as u8),
        }
    }
}

/// Rounds to the nearest bf16, ties to even. `bf16::from_f64` ignores the lower 32 bits of `v`, so that it rounds values
/// very close to a tie as if they were ties.
pub fn to_bf16(v: f64) -> bf16 {
    // Round to odd: truncate to f32 and set the last bit if the value was inexact. Rounding the result to bf16 is then
    // correct, since f32 has at least two more mantissa bits than bf16.
    let near = v as f32;
    if v.is_nan() || f64::from(near) == v {
        return bf16::from_f32(near);
    }
    let cut = near.to_bits() - u32::from(f64::from(near).abs() > v.abs());
    bf16::from_f32(f32::from_bits(cut | 1))
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type of tensor elements.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {
    /// The element type at run time.
    const DTYPE: DType;
}

impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
impl Element for u8 {
    const DTYPE: DType = DType::U8;
}

/// The two element types of a run: `act` for activations and the copies of weights that matrix products read, `acc` for
/// statistics, losses, parameter gradients, master weights and optimizer moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Element type of activations.
    pub act: DType,
    /// Element type of everything that is accumulated.
    pub acc: DType,
}

impl Precision {
    /// Double precision, for the reference implementation.
    pub const F64: Self = Self { act: DType::F64, acc: DType::F64 };
    /// Plain single precision.
    pub const F32: Self = Self { act: DType::F32, acc: DType::F32 };
    /// bfloat16 activations with f32 master weights.
    pub const BF16: Self = Self { act: DType::Bf16, acc: DType::F32 };

    /// Parses `f64`, `f32` or `bf16`.
    pub fn parse(s: &str) -> Option<Self> {
        match s {
            "f64" => Some(Self::F64),
            "f32" => Some(Self::F32),
            "bf16" => Some(Self::BF16),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    /// The two bf16 values around a number, the one closer to 0 first.
    fn neighbours(v: f64) -> [bf16; 2] {
        let below = bf16::from_bits(((v as f32).to_bits() >> 16) as u16);
        // `as` may have rounded away from 0, past a bf16 value.
        let below = match below.to_f64().abs() > v.abs() {
            true => bf16::from_bits(below.to_bits() - 1),
            false => below,
        };
        [below, bf16::from_bits(below.to_bits() + 1)]
    }

    /// Checks `to_bf16` by its definition: the nearest value, ties to even.
    fn check(v: f64) {
        let got = to_bf16(v);
        let [near, far] = neighbours(v);
        // Beyond the largest bf16, infinity takes the place of 2^128.
        let far_value = if far.is_finite() { far.to_f64().abs() } else { 2f64.powi(128) };
        let (low, high) = (v.abs() - near.to_f64().abs(), far_value - v.abs());
        assert!(low >= 0.0 && high > 0.0, "{v:e} lies between {near} and {far}");
        let want = match low.total_cmp(&high) {
            std::cmp::Ordering::Less => near,
            std::cmp::Ordering::Greater => far,
            std::cmp::Ordering::Equal => [near, far][usize::from(near.to_bits() & 1 == 1)],
        };
        assert_eq!(got.to_bits(), want.to_bits(), "{v:e}: {got}, wanted {want}");
    }

    #[test]
    fn f64_is_rounded_to_bf16_once() {
        // Ties of all kinds, and the closest f64 values on both sides of each.
        let bits: Vec<u16> = (0..0x7F80).step_by(61).chain([0, 1, 0x7F, 0x80, 0x7F7F]).collect();
        for (b, negative) in bits.into_iter().flat_map(|b| [(b, false), (b, true)]) {
            let at = bf16::from_bits(b).to_f64();
            let next = if b == 0x7F7F { 2f64.powi(128) } else { bf16::from_bits(b + 1).to_f64() };
            let middle = 0.5 * (at + next);
            for v in [at, middle, middle.next_down(), middle.next_up(), at.next_up(), middle * (1.0 + 1e-9)] {
                check(if negative { -v } else { v });
            }
        }
        let mut rng = Philox::new(1, 0);
        for _ in 0..200_000 {
            check(rng.normal() * 2f64.powi(rng.below(200) as i32 - 100));
        }
        // Rounding twice, or ignoring the lower 32 bits, gives wrong results.
        let v = 1.0 + 2f64.powi(-8) + 2f64.powi(-50);
        assert_eq!((to_bf16(v).to_f64(), bf16::from_f64(v).to_f64()), (1.0 + 2f64.powi(-7), 1.0));
        assert_eq!(bf16::from_f32(v as f32).to_f64(), 1.0);
    }

    #[test]
    fn specials_stay_what_they_are() {
        for (v, want) in [
            (f64::INFINITY, f64::INFINITY),
            (f64::NEG_INFINITY, f64::NEG_INFINITY),
            (f64::MAX, f64::INFINITY),
            (f64::from(f32::MAX), f64::INFINITY),
            (1e-60, 0.0),
            (0.1, 0.100_097_656_25),
        ] {
            assert_eq!(to_bf16(v).to_f64(), want, "{v:e}");
        }
        assert!(
            to_bf16(f64::NAN).is_nan()
                && to_bf16(-0.0).is_sign_negative()
                && to_bf16(-1e-60).is_sign_negative()
        );
        assert_eq!(
            [DType::F64, DType::F32, DType::Bf16, DType::I32].map(|t| t.rounded(0.1)),
            [0.1, f64::from(0.1f32), 0.100_097_656_25, 0.0]
        );
    }
}
