//! How values are stored in files.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::backend::to_bf16;
use crate::error::{Error, Result};

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Encoding {
    /// 8-byte floats.
    F64,
    /// 4-byte floats.
    F32,
    /// 2-byte floats of IEEE 754.
    F16,
    /// 2-byte floats with the exponents of 4-byte ones.
    Bf16,
    /// 8-byte integers.
    I64,
    /// 4-byte integers.
    I32,
    /// 2-byte integers.
    I16,
    /// 1-byte integers.
    I8,
    /// 8-byte integers without a sign.
    U64,
    /// 4-byte integers without a sign.
    U32,
    /// 2-byte integers without a sign.
    U16,
    /// Bytes.
    U8,
    /// Truth values, a byte each.
    Bool,
    /// GGUF: blocks of 32 values in 20 bytes, a scale and a minimum in f16, then 4 bits a value.
    Q4_1,
    /// GGUF: blocks of 32 values in 34 bytes, a scale in f16, then a signed byte a value.
    Q8_0,
    /// A type of which ett reads no values, so that files with it can be listed, and their other tensors read.
    Unread {
        /// Its name in files.
        name: &'static str,
        /// Values that fill whole bytes.
        values: usize,
        /// Their bytes.
        bytes: usize,
    },
}

/// Values in a block of the quantized encodings.
const BLOCK: usize = 32;

impl Encoding {
    /// Its name in messages, as safetensors or GGUF spell it.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::F64 => "F64",
            Encoding::F32 => "F32",
            Encoding::F16 => "F16",
            Encoding::Bf16 => "BF16",
            Encoding::I64 => "I64",
            Encoding::I32 => "I32",
            Encoding::I16 => "I16",
            Encoding::I8 => "I8",
            Encoding::U64 => "U64",
            Encoding::U32 => "U32",
            Encoding::U16 => "U16",
            Encoding::U8 => "U8",
            Encoding::Bool => "BOOL",
            Encoding::Q4_1 => "Q4_1",
            Encoding::Q8_0 => "Q8_0",
            Encoding::Unread { name, .. } => name,
        }
    }

    /// Whether ett reads its values.
    pub fn is_read(self) -> bool {
        !matches!(self, Encoding::Unread { .. })
    }

    /// Whether its values are floats that ett reads.
    pub fn is_float(self) -> bool {
        use Encoding::{Bf16, F16, F32, F64, Q4_1, Q8_0};
        matches!(self, F64 | F32 | F16 | Bf16 | Q4_1 | Q8_0)
    }

    /// The values of a block and its bytes.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Encoding::F64 | Encoding::I64 | Encoding::U64 => (1, 8),
            Encoding::F32 | Encoding::I32 | Encoding::U32 => (1, 4),
            Encoding::F16 | Encoding::Bf16 | Encoding::I16 | Encoding::U16 => (1, 2),
            Encoding::I8 | Encoding::U8 | Encoding::Bool => (1, 1),
            Encoding::Q4_1 => (BLOCK, 20),
            Encoding::Q8_0 => (BLOCK, 34),
            Encoding::Unread { values, bytes, .. } => (values, bytes),
        }
    }

    /// The bytes of `count` values; `None` if they do not fill blocks or cannot be addressed.
    pub fn bytes(self, count: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        count
            .is_multiple_of(values)
            .then(|| (count / values).checked_mul(bytes))?
            .filter(|&n| n <= isize::MAX as usize)
    }

    /// The values as f64; `None` if they are not read. A partial block at the end is left out.
    pub(super) fn widen(self, b: &[u8]) -> Option<Vec<f64>> {
        fn all<T: bytemuck::AnyBitPattern>(b: &[u8], f: fn(T) -> f64) -> Option<Vec<f64>> {
            Some(b.chunks_exact(size_of::<T>()).map(|c| f(bytemuck::pod_read_unaligned(c))).collect())
        }
        match self {
            Encoding::F64 => all::<f64>(b, |x| x),
            Encoding::F32 => all::<f32>(b, f64::from),
            Encoding::F16 => all::<f16>(b, f64::from),
            Encoding::Bf16 => all::<bf16>(b, f64::from),
            Encoding::I64 => all::<i64>(b, |x| x as f64),
            Encoding::I32 => all::<i32>(b, f64::from),
            Encoding::I16 => all::<i16>(b, f64::from),
            Encoding::I8 => all::<i8>(b, f64::from),
            Encoding::U64 => all::<u64>(b, |x| x as f64),
            Encoding::U32 => all::<u32>(b, f64::from),
            Encoding::U16 => all::<u16>(b, f64::from),
            Encoding::U8 => all::<u8>(b, f64::from),
            Encoding::Bool => all::<u8>(b, |x| f64::from(u8::from(x != 0))),
            Encoding::Q4_1 | Encoding::Q8_0 => {
                let mut values = Vec::with_capacity(b.len() / self.block().1 * BLOCK);
                b.chunks_exact(self.block().1).for_each(|block| values.extend(self.block_of(block)));
                Some(values.into_iter().map(f64::from).collect())
            }
            Encoding::Unread { .. } => None,
        }
    }

    /// The bytes of values, rounded to this encoding. The quantized encodings are only read.
    pub fn encode(self, values: &[f64]) -> Result<Vec<u8>> {
        fn all<T: bytemuck::NoUninit>(values: &[f64], f: fn(f64) -> T) -> Vec<u8> {
            bytemuck::cast_slice(&values.iter().map(|&x| f(x)).collect::<Vec<_>>()).to_vec()
        }
        Ok(match self {
            Encoding::F64 => bytemuck::cast_slice(values).to_vec(),
            Encoding::F32 => all(values, |x| x as f32),
            Encoding::F16 => all(values, f16::from_f64),
            Encoding::Bf16 => all(values, to_bf16),
            Encoding::I64 => all(values, |x| x as i64),
            Encoding::I32 => all(values, |x| x as i32),
            Encoding::I16 => all(values, |x| x as i16),
            Encoding::I8 => all(values, |x| x as i8),
            Encoding::U64 => all(values, |x| x as u64),
            Encoding::U32 => all(values, |x| x as u32),
            Encoding::U16 => all(values, |x| x as u16),
            Encoding::U8 => all(values, |x| x as u8),
            Encoding::Bool => all(values, |x| u8::from(x != 0.0)),
            Encoding::Q4_1 | Encoding::Q8_0 | Encoding::Unread { .. } => {
                return Err(Error::arg(
                    "encode",
                    "encoding",
                    self.name(),
                    "one that ett writes, such as BF16",
                ));
            }
        })
    }

    /// The number of stored floats that are not finite, counted in parallel; `None` for other encodings.
    pub fn count_not_finite(self, bytes: &[u8]) -> Option<usize> {
        /// Bytes that a thread takes at a time.
        const PIECE: usize = 1 << 20;
        fn all<T: bytemuck::AnyBitPattern>(bytes: &[u8], bad: impl Fn(T) -> bool + Sync) -> Option<usize> {
            let count = |piece: &[u8]| {
                let values = piece.chunks_exact(size_of::<T>()).map(|c| bytemuck::pod_read_unaligned::<T>(c));
                values.map(|x| usize::from(bad(x))).sum::<usize>()
            };
            Some(bytes.par_chunks(PIECE).map(count).sum())
        }
        match self {
            Encoding::F64 => all(bytes, |x: f64| !x.is_finite()),
            Encoding::F32 => all(bytes, |x: f32| !x.is_finite()),
            // All bits of the exponent are 1.
            Encoding::F16 => all(bytes, |x: u16| x & 0x7c00 == 0x7c00),
            Encoding::Bf16 => all(bytes, |x: u16| x & 0x7f80 == 0x7f80),
            _ => None,
        }
    }

    /// The values of a quantized block, in f32 as llama.cpp computes them.
    fn block_of(self, block: &[u8]) -> [f32; BLOCK] {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let mut out = [0.0; BLOCK];
        match self {
            Encoding::Q4_1 => {
                let (scale, least) = (half(0), half(2));
                for (i, &b) in block[4..].iter().enumerate() {
                    out[i] = f32::from(b & 15) * scale + least;
                    out[i + BLOCK / 2] = f32::from(b >> 4) * scale + least;
                }
            }
            _ => {
                let scale = half(0);
                for (out, &b) in out.iter_mut().zip(&block[2..]) {
                    *out = f32::from(b as i8) * scale;
                }
            }
        }
        out
    }
}
