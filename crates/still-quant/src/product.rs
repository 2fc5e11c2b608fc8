//! Matrix products.

use std::ops::Range;

use rayon::prelude::*;
use still_attention::linalg::{Mat, par_matmul};
use still_attention::vector::vectorize;

use crate::block::{Block, PIECE, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
use crate::format::Format;
use crate::matrix::QuantizedMatrix;

/// Rows of `x` up to which blocks are widened in registers, each for all of them.
const FEW: usize = 8;
/// Rows of the matrix that one thread takes at a time.
const ROWS_PER_TASK: usize = 32;
/// Values widened at a time for a f32 product: they stay in the second- or third-level cache.
const STRETCH: usize = 1 << 21;
/// Partial sums kept side by side.
const LANES: usize = 16;

/// Runs one body with the format's block type.
macro_rules! with_block {
    ($format:expr, $block:ident => $body:expr) => {
        match $format {
            Format::Q4_0 => {
                type $block = Q4_0;
                $body
            }
            Format::Q4_1 => {
                type $block = Q4_1;
                $body
            }
            Format::Q8_0 => {
                type $block = Q8_0;
                $body
            }
            Format::Q4K => {
                type $block = Q4K;
                $body
            }
            Format::Q6K => {
                type $block = Q6K;
                $body
            }
        }
    };
}

/// Widens whole rows.
pub fn dequantize(format: Format, columns: usize, bytes: &[u8], out: &mut [f32]) {
    with_block!(format, B => {
        let row_bytes = columns / B::VALUES * B::BYTES;
        let values = ROWS_PER_TASK * columns;
        out.par_chunks_mut(values).zip(bytes.par_chunks(ROWS_PER_TASK * row_bytes)).for_each(
            |(out, bytes)| {
                vectorize(
                    #[inline(always)]
                    || widen::<B>(bytes, out),
                );
            },
        );
    });
}

#[inline(always)]
fn widen<B: Block>(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks_exact(B::BYTES).zip(out.chunks_exact_mut(B::VALUES)) {
        B::pieces(
            block,
            #[inline(always)]
            |piece, values| out[piece * PIECE..(piece + 1) * PIECE].copy_from_slice(values),
        );
    }
}

/// See [`QuantizedMatrix::multiply`], which checks the sizes.
pub fn multiply(matrix: &QuantizedMatrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let columns = matrix.columns();
    let n = x.len() / columns;
    if n == 0 || rows.is_empty() {
        return;
    }
    if n > FEW {
        return multiply_many(matrix, rows, x, y);
    }
    let size = matrix.row_bytes();
    let bytes = &matrix.bytes()[rows.start * size..rows.end * size];
    if n == 1 {
        with_block!(matrix.format(), B => few::<B, 1>(bytes, size, x, y));
        return;
    }
    // Transposed results, as threads own rows of the matrix: `[rows, n]`.
    let mut transposed = vec![0.0; y.len()];
    with_block!(matrix.format(), B => match n {
        2 => few::<B, 2>(bytes, size, x, &mut transposed),
        3 => few::<B, 3>(bytes, size, x, &mut transposed),
        4 => few::<B, 4>(bytes, size, x, &mut transposed),
        5 => few::<B, 5>(bytes, size, x, &mut transposed),
        6 => few::<B, 6>(bytes, size, x, &mut transposed),
        7 => few::<B, 7>(bytes, size, x, &mut transposed),
        _ => few::<B, 8>(bytes, size, x, &mut transposed),
    });
    for (row, values) in transposed.chunks_exact(n).enumerate() {
        for (i, &value) in values.iter().enumerate() {
            y[i * rows.len() + row] = value;
        }
    }
}

/// `y[row][i] = x[i] · row` for the `N` rows of `x`.
fn few<B: Block, const N: usize>(bytes: &[u8], row_bytes: usize, x: &[f32], y: &mut [f32]) {
    let columns = x.len() / N;
    y.par_chunks_mut(ROWS_PER_TASK * N).zip(bytes.par_chunks(ROWS_PER_TASK * row_bytes)).for_each(
        |(y, bytes)| {
            vectorize(
                #[inline(always)]
                || {
                    for (row, y) in bytes.chunks_exact(row_bytes).zip(y.chunks_exact_mut(N)) {
                        dot_rows::<B, N>(row, x, columns, y);
                    }
                },
            );
        },
    );
}

#[inline(always)]
fn dot_rows<B: Block, const N: usize>(row: &[u8], x: &[f32], columns: usize, y: &mut [f32]) {
    // Two registers a row of x: a sum must not wait for the one before it.
    let mut sums = [[[0.0_f32; LANES]; PIECE / LANES]; N];
    for (block, bytes) in row.chunks_exact(B::BYTES).enumerate() {
        B::pieces(
            bytes,
            #[inline(always)]
            |piece, values| {
                let start = block * B::VALUES + piece * PIECE;
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = &x[i * columns + start..i * columns + start + PIECE];
                    for (part, sums) in sums.iter_mut().enumerate() {
                        for lane in 0..LANES {
                            let at = part * LANES + lane;
                            sums[lane] = values[at].mul_add(x[at], sums[lane]);
                        }
                    }
                }
            },
        );
    }
    for (y, [a, b]) in y.iter_mut().zip(sums) {
        let mut lanes = [0.0; LANES];
        for i in 0..LANES {
            lanes[i] = a[i] + b[i];
        }
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        *y = lanes[0];
    }
}

/// Many rows of `x`: a f32 product with a stretch of widened rows at a time.
fn multiply_many(matrix: &QuantizedMatrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let (columns, out) = (matrix.columns(), rows.len());
    let n = x.len() / columns;
    let step = (STRETCH / columns).max(1);
    let mut wide = Vec::new();
    for start in rows.clone().step_by(step) {
        let end = (start + step).min(rows.end);
        matrix.dequantize_into(start..end, &mut wide);
        let w = Mat::rows(&wide, columns).t();
        let y = &mut y[start - rows.start..];
        par_matmul((n, end - start, columns), y, out, false, Mat::rows(x, columns), w);
    }
}
