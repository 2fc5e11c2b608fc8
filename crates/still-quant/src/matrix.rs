//! A matrix in one of the formats.

use std::ops::Range;

use rayon::prelude::*;
use still_compute::new_vec;
use still_compute::pages::Pages;

use crate::block::Block;
use crate::format::{Format, with_block, with_integer};
use crate::fused::{Fused, Gated};
use crate::integer::{Integer, Order, Rows, Unit};
use crate::many;
use crate::product::{self, Output};
use crate::tile::{LANES, Words};

/// What can be wrong with a packed matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Columns that blocks do not divide.
    #[error("{columns} columns do not divide into blocks of {block} ({format:?})")]
    Columns {
        /// The format.
        format: Format,
        /// Columns asked for.
        columns: usize,
        /// Values of a block.
        block: usize,
    },
    /// Another number of bytes than the shape needs.
    #[error("{got} bytes for a matrix that needs {expected}")]
    Bytes {
        /// Bytes given.
        got: usize,
        /// Bytes needed.
        expected: usize,
    },
}

/// A matrix `[rows, columns]` in 16 bits or a block format, in tiles of 16 rows; cheap to clone.
#[derive(Clone)]
pub struct PackedMatrix {
    format: Format,
    rows: usize,
    columns: usize,
    /// `[tiles, blocks of a row, words of a block]`; rows past the last are zeros.
    words: Pages<Words>,
    /// Multiplies the codes as the whole numbers that they are.
    integer: Option<Unit>,
}

/// What products need to know of rows of `x`: the same for all tiles, and for all matrices that
/// [prepare alike](PackedMatrix::prepares_like).
#[derive(Clone, Debug, Default)]
pub struct PreparedRows {
    /// `Σ x` of each group of each row, where codes meet values as they are.
    pub(crate) sums: Vec<f32>,
    /// Where they meet digits.
    pub(crate) digits: Rows,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?} [{}, {}])", self.format, self.rows, self.columns)
    }
}

impl PackedMatrix {
    /// From a file's own bytes, rows contiguous; nothing is rounded.
    ///
    /// # Errors
    /// Columns or bytes that do not fit the format.
    pub fn new(
        format: Format,
        rows: usize,
        columns: usize,
        bytes: &[u8],
    ) -> Result<Self, PackError> {
        let block = format.block_values();
        if columns == 0 || !columns.is_multiple_of(block) {
            return Err(PackError::Columns { format, columns, block });
        }
        let row_bytes = format.row_bytes(columns);
        if bytes.len() != rows * row_bytes {
            return Err(PackError::Bytes { got: bytes.len(), expected: rows * row_bytes });
        }
        let row_words = columns / block * format.tile_words();
        let words = Pages::new(rows.div_ceil(LANES) * row_words, |words: &mut [Words]| {
            with_block!(format, B => {
                words.par_chunks_mut(row_words).zip(bytes.par_chunks(LANES * row_bytes)).for_each(
                    |(tile, bytes)| {
                        for (lane, row) in bytes.chunks_exact(row_bytes).enumerate() {
                            let tiles = tile.chunks_exact_mut(B::WORDS);
                            for (block, tile) in row.chunks_exact(B::BYTES).zip(tiles) {
                                B::pack(block, tile, lane);
                            }
                        }
                    },
                );
            });
        });
        let integer = with_integer!(format, B => B::ORDER).and_then(|_| Unit::find());
        Ok(Self { format, rows, columns, words, integer })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn size_bytes(&self) -> usize {
        size_of_val::<[Words]>(&self.words)
    }

    /// The words of some tiles.
    pub(crate) fn tiles(&self, tiles: Range<usize>) -> &[Words] {
        let size = self.columns / self.format.block_values() * self.format.tile_words();
        &self.words[tiles.start * size..tiles.end * size]
    }

    /// The f32 values of some rows, over what `out` held: `[rows, columns]`.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn dequantize_into(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        out.resize(rows.len() * self.columns, f32::NAN);
        product::dequantize(self, rows, out);
    }

    /// The f32 values of one row into `out` `[columns]`, on this thread and without an allocation where `scratch` has been
    /// here before.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not of its size.
    pub fn dequantize_row(&self, row: usize, scratch: &mut Vec<f32>, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.columns, "out is not [{}]", self.columns);
        product::dequantize_row(self, row, scratch, out);
    }

    /// What [`PackedMatrix::multiply_tiles`] needs to know of `x` `[n, columns]`, over what `rows` held.
    pub fn prepare(&self, x: &[f32], rows: &mut PreparedRows) {
        product::prepare(self, x, rows);
    }

    /// Whether rows that one of the two has prepared are as the other needs them.
    pub fn prepares_like(&self, other: &Self) -> bool {
        let of = |matrix: &Self| (matrix.columns, matrix.group(), matrix.order());
        of(self) == of(other)
    }

    /// How digits are ordered; none if codes meet values as they are.
    pub(crate) fn order(&self) -> Option<Order> {
        self.integer.and(with_integer!(self.format, B => B::ORDER))
    }

    /// Columns that share a scale.
    fn group(&self) -> Option<usize> {
        with_block!(self.format, B => (!B::PLAIN).then_some(B::GROUP))
    }

    /// See [`Unit`].
    pub(crate) fn integer(&self) -> Option<Unit> {
        self.integer
    }

    /// `x Wᵀ` for the rows of some tiles, on this thread alone: `y` is `[tiles, n, 16]`, rows past the last are 0. A row of `x` has
    /// the same products for every `n`, bit for bit.
    ///
    /// # Panics
    /// If there are no such tiles, or `x`, `rows` and `y` are not of these sizes.
    pub fn multiply_tiles(
        &self,
        tiles: Range<usize>,
        x: &[f32],
        rows: &PreparedRows,
        y: &mut [f32],
    ) {
        product::multiply_tiles(self, tiles, x, rows, y);
    }

    /// `y = x Wᵀ` for `x` `[n, columns]` and rows `rows` of the matrix: `y` is `[n, rows]`.
    ///
    /// Up to 63 rows, with AMX any number, meet the codes as they are unpacked; for more, a stretch of the matrix is dequantized at a time.
    ///
    /// # Panics
    /// If there are no such rows, or `x` and `y` are not of these sizes.
    pub fn multiply(&self, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
        assert_eq!(y.len(), self.products(&rows, x), "y is not [n, {}]", rows.len());
        product::multiply(self, rows, x, Output::new(y));
    }

    /// [`PackedMatrix::multiply`] into a new vector, whose memory is not zeroed first.
    ///
    /// # Panics
    /// If there are no such rows, or `x` is not of this size.
    pub fn multiply_new(&self, rows: Range<usize>, x: &[f32]) -> Vec<f32> {
        let length = self.products(&rows, x);
        // SAFETY: the product writes all of them.
        unsafe { new_vec(length, |y| product::multiply(self, rows, x, Output::uninit(y))) }
    }

    /// `x Wᵀ` for `x` `[n, columns]` and all rows of the matrix with what is `fused` with it, `[n, rows]`, where products of so many rows
    /// are those of widened values ([`PackedMatrix::multiply`]) and the other matrix, if there is one, is stored alike. Elsewhere `None`.
    ///
    /// # Panics
    /// If `x` or what is fused is not of this size.
    pub fn multiply_fused(&self, x: &[f32], fused: Fused<'_>) -> Option<Vec<f32>> {
        let (rows, columns) = (self.rows, self.columns);
        let length = self.products(&(0..rows), x);
        if let Some(update) = fused.update {
            update.rank(rows, columns);
        }
        if let Some(onto) = fused.onto {
            assert_eq!(onto.len(), length, "onto is not [n, {rows}]");
        }
        if let Some(Gated { up, .. }) = fused.gated {
            assert_eq!((up.rows, up.columns), (rows, columns), "up is not [{rows}, {columns}]");
        }
        let alike = fused.gated.is_none_or(|gated| gated.up.format == self.format);
        if !alike || !product::widens(self, x.len() / columns) {
            return None;
        }
        let write = |y: &mut [_]| many::multiply(self, 0..rows, x, Output::uninit(y), fused);
        // SAFETY: the product writes all of them.
        Some(unsafe { new_vec(length, write) })
    }

    /// How many products there are of `x` and these rows.
    fn products(&self, rows: &Range<usize>, x: &[f32]) -> usize {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(x.len().is_multiple_of(self.columns), "x is not [n, {}]", self.columns);
        x.len() / self.columns * rows.len()
    }
}
