//! Element types and the precision pair of a run.

use half::bf16;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DType {
    /// IEEE binary64: the oracle.
    F64 = 0,
    /// IEEE binary32.
    F32 = 1,
    /// bfloat16: storage only, every sum is float32.
    Bf16 = 2,
    /// Indices, positions, sequence offsets.
    I32 = 3,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
        }
    }

    /// Lower-case name as used in configurations and messages.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::I32 => "i32",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A type that a tensor can hold on the host.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {
    /// The runtime tag of this type.
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

/// `act`: activations and the weights that products read. `acc`: statistics, losses, parameter
/// gradients, master weights and optimizer moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Element type of activations.
    pub act: DType,
    /// Element type of everything that is accumulated.
    pub acc: DType,
}

impl Precision {
    /// The oracle.
    pub const F64: Self = Self { act: DType::F64, acc: DType::F64 };
    /// Plain single precision.
    pub const F32: Self = Self { act: DType::F32, acc: DType::F32 };
    /// bfloat16 activations over float32 masters.
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
