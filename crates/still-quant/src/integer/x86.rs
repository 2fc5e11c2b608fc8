//! Which of the instructions this CPU has.

use pulp::x86::{V3, V4};
use still_compute::amx::{self as matrix_unit, multiplies};

use super::{Integer, Order, Rows, amx, avx2, vnni, words};
use crate::tile::{LANES, Words};

/// Proof that this CPU has what multiplies bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// AVX2: codes in pairs.
    Pairs(V3),
    /// AVX512_VNNI.
    Fours(V4),
    /// AVX512_VNNI, and AMX-INT8 for many rows, which this process may use.
    Tiles(V4),
}

impl Unit {
    /// The fastest of this CPU.
    pub fn find() -> Option<Self> {
        if let Some(simd) = V4::try_new().filter(|_| is_x86_feature_detected!("avx512vnni")) {
            let tiles = multiplies(matrix_unit::Unit::Int8);
            return Some(if tiles { Self::Tiles(simd) } else { Self::Fours(simd) });
        }
        V3::try_new().map(Self::Pairs)
    }

    /// Whether many rows are multiplied in tiles.
    pub fn has_tiles(self) -> bool {
        matches!(self, Self::Tiles(_))
    }

    /// Rows `x` `[n, columns]` in digits, over what `rows` held.
    pub fn digits_into(self, x: &[f32], columns: usize, order: Order, rows: &mut Rows) {
        match self {
            // SAFETY: `self` proves that the CPU has these features.
            Self::Pairs(_) => unsafe { avx2::digits_into(x, columns, order, rows) },
            // SAFETY: as above.
            Self::Fours(_) | Self::Tiles(_) => unsafe {
                vnni::digits_into(x, columns, order, rows);
            },
        }
    }

    /// `y[tile][i][lane] = x[i] · row` for the rows of `x` and those of some tiles.
    pub fn multiply<B: Integer>(
        self,
        words: &[Words],
        row_words: usize,
        rows: &Rows,
        y: &mut [f32],
    ) {
        let tiles = words.len() / row_words;
        assert_eq!(y.len(), tiles * rows.count() * LANES, "y is not [tiles, n, 16]");
        assert_eq!(
            row_words,
            rows.width * super::GROUP / B::VALUES * B::WORDS,
            "x is of other columns"
        );
        match self {
            Self::Tiles(simd) if rows.count() >= amx::ROWS => {
                // SAFETY: `self` proves that the CPU has these features and that the process may use tiles.
                unsafe { amx::multiply::<B>(simd, words, row_words, rows, y) }
            }
            Self::Fours(simd) | Self::Tiles(simd) => {
                // SAFETY: `self` proves that the CPU has these features.
                unsafe { vnni::multiply::<B>(simd, words, row_words, rows, y) }
            }
            // SAFETY: as above.
            Self::Pairs(simd) => unsafe {
                match B::ORDER {
                    Order::Nibbles => avx2::multiply::<B>(simd, words, row_words, rows, y),
                    Order::Bytes => words::multiply::<B>(simd, words, row_words, rows, y),
                }
            },
        }
    }

    /// All that this CPU has.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let pairs = V3::try_new().map(Self::Pairs);
        let best = Self::find().filter(|best| !matches!(best, Self::Pairs(_)));
        let fours = match best {
            Some(Self::Tiles(simd)) => Some(Self::Fours(simd)),
            _ => None,
        };
        [best, fours, pairs].into_iter().flatten().collect()
    }
}
