//! The formats, by name and size.

use crate::block::Block;

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

/// Runs one body with the format's [`Block`] as a type.
macro_rules! with_block {
    ($format:expr, $block:ident => $body:expr) => {
        $crate::format::with_block!(
            $format, $block => $body, Bf16 F16 Q4_0 Q4_1 Q8_0 Q4K Q6K
        )
    };
    ($format:expr, $block:ident => $body:expr, $($name:ident)*) => {
        match $format {
            $($crate::Format::$name => {
                type $block = $crate::block::$name;
                $body
            })*
        }
    };
}
pub(crate) use with_block;

/// Runs one body with the format's [`Integer`](crate::integer::Integer) block as a type; none if its codes are no whole numbers of up to
/// eight bits in groups of 32.
macro_rules! with_integer {
    ($format:expr, $block:ident => $body:expr) => {
        $crate::format::with_integer!($format, $block => $body, Q4_0 Q4_1 Q8_0 Q4K)
    };
    ($format:expr, $block:ident => $body:expr, $($name:ident)*) => {
        match $format {
            $($crate::Format::$name => {
                type $block = $crate::block::$name;
                Some($body)
            })*
            $crate::Format::Bf16 | $crate::Format::F16 | $crate::Format::Q6K => None,
        }
    };
}
pub(crate) use with_integer;

impl Format {
    /// Values of a block.
    pub fn block_values(self) -> usize {
        with_block!(self, B => B::VALUES)
    }

    /// Bytes of a row of so many values in a file.
    pub fn row_bytes(self, columns: usize) -> usize {
        with_block!(self, B => columns / B::VALUES * B::BYTES)
    }

    /// Words of a block of 16 rows in memory.
    pub(crate) fn tile_words(self) -> usize {
        with_block!(self, B => B::WORDS)
    }
}
