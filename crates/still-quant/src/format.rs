//! The formats, by name and size.

use crate::block::{Bf16, Block, F16, Q4_0, Q4_1, Q4K, Q6K, Q8_0};

/// How a matrix is stored: 16-bit floats, or a block format of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names are GGUF's own")]
pub enum Format {
    /// Values of 16 bits, the upper half of an f32.
    Bf16,
    /// Values in IEEE half precision.
    F16,
    /// 32 values of 4 bits, one scale.
    Q4_0,
    /// 32 values of 4 bits, scale and minimum.
    Q4_1,
    /// 32 values of 8 bits, one scale.
    Q8_0,
    /// 256 values of 4 bits, a scale and a minimum for each 32, themselves in 6 bits.
    Q4K,
    /// 256 values of 6 bits, a scale for each 16, itself in 8 bits.
    Q6K,
}

impl Format {
    /// Values of a block.
    pub fn block_values(self) -> usize {
        match self {
            Self::Bf16 => Bf16::VALUES,
            Self::F16 => F16::VALUES,
            Self::Q4_0 => Q4_0::VALUES,
            Self::Q4_1 => Q4_1::VALUES,
            Self::Q8_0 => Q8_0::VALUES,
            Self::Q4K => Q4K::VALUES,
            Self::Q6K => Q6K::VALUES,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Bf16 => Bf16::BYTES,
            Self::F16 => F16::BYTES,
            Self::Q4_0 => Q4_0::BYTES,
            Self::Q4_1 => Q4_1::BYTES,
            Self::Q8_0 => Q8_0::BYTES,
            Self::Q4K => Q4K::BYTES,
            Self::Q6K => Q6K::BYTES,
        }
    }
}
