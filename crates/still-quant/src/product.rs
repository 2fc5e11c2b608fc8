//! Matrix products.

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use still_attention::linalg::{Mat, par_matmul, transpose};
use still_attention::vector;

use crate::block::{Block, PIECE};
use crate::format::{Format, with_block};
use crate::matrix::PackedMatrix;

/// Rows of `x` up to which blocks are widened in registers, each for all of them.
pub const FEW: usize = 8;
/// Rows of the matrix that one thread takes at a time.
const ROWS_PER_TASK: usize = 32;
/// Values widened at a time for a f32 product: they stay in the second- or third-level cache.
const STRETCH: usize = 1 << 19;

/// Widens whole rows.
pub fn dequantize(format: Format, columns: usize, bytes: &[u8], out: &mut [f32]) {
    with_block!(format, B => {
        let row_bytes = columns / B::VALUES * B::BYTES;
        let values = ROWS_PER_TASK * columns;
        out.par_chunks_mut(values).zip(bytes.par_chunks(ROWS_PER_TASK * row_bytes)).for_each(
            |(out, bytes)| {
                Arch::new().dispatch(Widen::<B> { bytes, out, block: PhantomData });
            },
        );
    });
}

/// Some rows of a matrix in [`dequantize`].
struct Widen<'a, B> {
    bytes: &'a [u8],
    out: &'a mut [f32],
    block: PhantomData<B>,
}

impl<B: Block> WithSimd for Widen<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let blocks = self.bytes.chunks_exact(B::BYTES);
        for (bytes, out) in blocks.zip(self.out.chunks_exact_mut(B::VALUES)) {
            B::pieces(
                bytes,
                #[inline(always)]
                |index, piece| {
                    let out = &mut out[index * PIECE..(index + 1) * PIECE];
                    let (out, _) = S::as_mut_simd_f32s(out);
                    let (quants, _) = S::as_simd_f32s(&piece.quants);
                    let scales = piece.scales.map(|scale| simd.splat_f32s(scale));
                    let offset = simd.splat_f32s(piece.offset);
                    let registers = quants.len();
                    for (at, (out, &quants)) in out.iter_mut().zip(quants).enumerate() {
                        *out = simd.mul_add_f32s(quants, scales[2 * at / registers], offset);
                    }
                },
            );
        }
    }
}

/// See [`PackedMatrix::multiply`], which checks the sizes.
pub fn multiply(matrix: &PackedMatrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
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
    transpose(&transposed, n, y);
}

/// `y[row][i] = x[i] · row` for the `N` rows of `x`.
///
/// `Σ (scale · quant + offset) x = Σ scale (Σ quant · x) + Σ offset (Σ x)`, and `Σ x` of a piece is the same for all rows.
fn few<B: Block, const N: usize>(bytes: &[u8], row_bytes: usize, x: &[f32], y: &mut [f32]) {
    let sums: Vec<f32> =
        if B::OFFSETS { x.chunks_exact(PIECE).map(vector::sum).collect() } else { Vec::new() };
    let sums = sums.as_slice();
    y.par_chunks_mut(ROWS_PER_TASK * N).zip(bytes.par_chunks(ROWS_PER_TASK * row_bytes)).for_each(
        |(y, bytes)| {
            Arch::new().dispatch(Few::<B, N> { bytes, row_bytes, x, sums, y, block: PhantomData });
        },
    );
}

/// Some rows of a matrix in [`few`].
struct Few<'a, B, const N: usize> {
    bytes: &'a [u8],
    row_bytes: usize,
    x: &'a [f32],
    /// `Σ x` of each piece of each row of `x`, for a format with offsets.
    sums: &'a [f32],
    y: &'a mut [f32],
    block: PhantomData<B>,
}

impl<B: Block, const N: usize> WithSimd for Few<'_, B, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let columns = self.x.len() / N;
        let rows = self.bytes.chunks_exact(self.row_bytes);
        for (row, y) in rows.zip(self.y.chunks_exact_mut(N)) {
            // Two registers a row of x: a sum must not wait for the one before it.
            let mut scaled = [[simd.splat_f32s(0.0); 2]; N];
            let mut offset = [0.0_f32; N];
            for (block, bytes) in row.chunks_exact(B::BYTES).enumerate() {
                B::pieces(
                    bytes,
                    #[inline(always)]
                    |index, piece| {
                        let start = block * B::VALUES + index * PIECE;
                        let (quants, _) = S::as_simd_f32s(&piece.quants);
                        let half = quants.len() / 2;
                        let scales = piece.scales.map(|scale| simd.splat_f32s(scale));
                        for (i, scaled) in scaled.iter_mut().enumerate() {
                            let x = &self.x[i * columns + start..i * columns + start + PIECE];
                            let (x, _) = S::as_simd_f32s(x);
                            for part in 0..2 {
                                let mut sum = simd.mul_f32s(quants[part * half], x[part * half]);
                                for at in part * half + 1..(part + 1) * half {
                                    sum = simd.mul_add_f32s(quants[at], x[at], sum);
                                }
                                scaled[part] = simd.mul_add_f32s(sum, scales[part], scaled[part]);
                            }
                            if B::OFFSETS {
                                let sum = self.sums[(i * columns + start) / PIECE];
                                offset[i] = piece.offset.mul_add(sum, offset[i]);
                            }
                        }
                    },
                );
            }
            for (i, (y, [a, b])) in y.iter_mut().zip(scaled).enumerate() {
                *y = simd.reduce_sum_f32s(simd.add_f32s(a, b)) + offset[i];
            }
        }
    }
}

/// Many rows of `x`: a f32 product with a stretch of widened rows at a time.
fn multiply_many(matrix: &PackedMatrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
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
