//! Which of the instructions this CPU has.

use pulp::x86::V4;
use still_compute::amx::{self as matrix_unit, multiplies};

use super::{Integer, Order, Rows, amx, vnni};
use crate::tile::Words;

/// Proof that this CPU multiplies bytes: AVX512_VNNI, and perhaps AMX-INT8.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit {
    simd: V4,
    /// Whether this process may use tiles, too.
    tiles: bool,
}

impl Unit {
    /// If this CPU has it.
    pub fn find() -> Option<Self> {
        let simd = V4::try_new().filter(|_| is_x86_feature_detected!("avx512vnni"))?;
        Some(Self { simd, tiles: multiplies(matrix_unit::Unit::Int8) })
    }

    /// Whether many rows are multiplied in tiles.
    pub fn has_tiles(self) -> bool {
        self.tiles
    }

    /// Rows `x` `[n, columns]` in digits, over what `rows` held.
    pub fn digits_into(self, x: &[f32], columns: usize, order: Order, rows: &mut Rows) {
        // SAFETY: `self` proves that the CPU has these features.
        unsafe { vnni::digits_into(x, columns, order, rows) }
    }

    /// `y[tile][i][lane] = x[i] · row` for the rows of `x` and those of some tiles.
    pub fn multiply<B: Integer>(
        self,
        words: &[Words],
        row_words: usize,
        rows: &Rows,
        y: &mut [f32],
    ) {
        assert_eq!(y.len(), words.len() / row_words * rows.count() * 16, "y is not [tiles, n, 16]");
        assert_eq!(
            row_words,
            rows.width * super::GROUP / B::VALUES * B::WORDS,
            "x is of other columns"
        );
        if self.tiles && rows.count() >= amx::ROWS {
            // SAFETY: `self` proves that the CPU has these features and that the process may use tiles.
            unsafe { amx::multiply::<B>(self.simd, words, row_words, rows, y) }
        } else {
            // SAFETY: `self` proves that the CPU has these features.
            unsafe { vnni::multiply::<B>(self.simd, words, row_words, rows, y) }
        }
    }

    /// Also without AMX, where there is it.
    #[cfg(test)]
    pub fn without_tiles_too(self) -> Vec<Self> {
        let other = self.tiles.then_some(Self { tiles: false, ..self });
        [self].into_iter().chain(other).collect()
    }
}
