//! A matrix in one of the formats.

use std::ops::Range;
use std::sync::Arc;

use crate::format::Format;
use crate::product;

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

/// A matrix `[rows, columns]` in a block format, rows contiguous; cheap to clone.
#[derive(Clone)]
pub struct PackedMatrix {
    format: Format,
    rows: usize,
    columns: usize,
    bytes: Arc<[u8]>,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?} [{}, {}])", self.format, self.rows, self.columns)
    }
}

impl PackedMatrix {
    /// From a file's own bytes.
    ///
    /// # Errors
    /// Columns or bytes that do not fit the format.
    pub fn new(
        format: Format,
        rows: usize,
        columns: usize,
        bytes: Arc<[u8]>,
    ) -> Result<Self, PackError> {
        let block = format.block_values();
        if columns == 0 || !columns.is_multiple_of(block) {
            return Err(PackError::Columns { format, columns, block });
        }
        let expected = rows * (columns / block) * format.block_bytes();
        if bytes.len() != expected {
            return Err(PackError::Bytes { got: bytes.len(), expected });
        }
        Ok(Self { format, rows, columns, bytes })
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

    /// The blocks, row by row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.columns / self.format.block_values() * self.format.block_bytes()
    }

    /// The matrix with its rows in another order: row `i` is this one's row `order[i]`.
    #[must_use]
    pub fn with_rows(&self, order: &[usize]) -> Self {
        let size = self.row_bytes();
        let bytes: Vec<u8> = order
            .iter()
            .flat_map(|&row| &self.bytes[row * size..(row + 1) * size])
            .copied()
            .collect();
        Self { rows: order.len(), bytes: bytes.into(), ..*self }
    }

    /// The f32 values of some rows, over what `out` held: `[rows, columns]`.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn dequantize_into(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        let size = self.row_bytes();
        let bytes = &self.bytes[rows.start * size..rows.end * size];
        out.resize(rows.len() * self.columns, f32::NAN);
        product::dequantize(self.format, self.columns, bytes, out);
    }

    /// `y = x Wᵀ` for `x` `[n, columns]` and rows `rows` of the matrix: `y` is `[n, rows]`.
    ///
    /// Small `n` reads each block once and widens it in registers; large `n` widens a stretch of rows at a time.
    ///
    /// # Panics
    /// If there are no such rows, or `x` and `y` are not of these sizes.
    pub fn multiply(&self, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(x.len().is_multiple_of(self.columns), "x is not [n, {}]", self.columns);
        assert_eq!(y.len(), x.len() / self.columns * rows.len(), "y is not [n, {}]", rows.len());
        product::multiply(self, rows, x, y);
    }
}
