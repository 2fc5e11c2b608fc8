//! Weighted sums of rows: the product of a small batch with a matrix that is read as it lies, without packing it first.

use std::ops::Range;

use super::cells::Cell;
use still_compute::Real;
use still_compute::vector;

/// Query rows up to which keys are best read as they are stored.
pub(crate) const SMALL_BATCH: usize = 8;

/// Rows that stay in the first-level cache while every channel of them is summed.
const ROWS: usize = 64;

/// The rows that are summed.
#[derive(Clone, Debug)]
pub(crate) struct Summed<'a, T, C> {
    /// Rows of `width` values.
    pub values: &'a [C],
    pub width: usize,
    pub range: Range<usize>,
    /// By row, if rows are scaled.
    pub scales: Option<&'a [T]>,
}

/// Adds to each row of `out`, rows of `out_stride`, the rows of `summed` times its weights, rows of `stride` in `weights`.
#[inline(never)]
pub(crate) fn add_weighted<T: Real, C: Cell<T>>(
    summed: Summed<'_, T, C>,
    weights: &[T],
    stride: usize,
    out: &mut [T],
    out_stride: usize,
) {
    if summed.range.is_empty() {
        return;
    }
    T::vectorize_batch(
        #[inline(always)]
        |several| {
            let rows = out.len().div_ceil(out_stride);
            let at_a_time = if several { 4 } else { 1 };
            for row in (0..rows).step_by(at_a_time) {
                let (weights, out) = (&weights[row * stride..], &mut out[row * out_stride..]);
                let (summed, rows) = (&summed, at_a_time.min(rows - row));
                match rows {
                    4 if several => {
                        add_small_batch::<T, C, 4>(summed, weights, stride, out, out_stride)
                    }
                    3 if several => {
                        add_small_batch::<T, C, 3>(summed, weights, stride, out, out_stride)
                    }
                    2 if several => {
                        add_small_batch::<T, C, 2>(summed, weights, stride, out, out_stride)
                    }
                    _ => add_small_batch::<T, C, 1>(summed, weights, stride, out, out_stride),
                }
            }
        },
    );
}

#[inline(always)]
fn add_small_batch<T: Real, C: Cell<T>, const N: usize>(
    summed: &Summed<'_, T, C>,
    weights: &[T],
    stride: usize,
    out: &mut [T],
    out_stride: usize,
) {
    let Summed { range, width, .. } = summed;
    let width = *width;
    // By row: what its values are multiplied by, for each row of `out`.
    let mut factors = [[T::zero(); N]; ROWS];
    for start in range.clone().step_by(ROWS) {
        let rows = start..(start + ROWS).min(range.end);
        let factors = &mut factors[..rows.len()];
        for n in 0..N {
            let weights = &weights[n * stride + start - range.start..][..rows.len()];
            match summed.scales {
                Some(scales) => {
                    let weights = weights.iter().zip(&scales[rows.clone()]);
                    let products = weights.map(|(&weight, &scale)| scale * weight);
                    factors.iter_mut().zip(products).for_each(|(row, x)| row[n] = x);
                }
                None => factors.iter_mut().zip(weights).for_each(|(row, &weight)| row[n] = weight),
            }
        }
        let rows = &summed.values[rows.start * width..rows.end * width];
        let mut column = 0;
        // One row's sums fit in any CPU's registers, and two at a time would wait for each other.
        if N == 1 || vector::has_many_registers() {
            while column + 64 <= width {
                add_columns::<T, C, N, 64>(rows, width, factors, column, out, out_stride);
                column += 64;
            }
        }
        while column + 16 <= width {
            add_columns::<T, C, N, 16>(rows, width, factors, column, out, out_stride);
            column += 16;
        }
        for column in column..width {
            add_columns::<T, C, N, 1>(rows, width, factors, column, out, out_stride);
        }
    }
}

/// `COLUMNS` columns of `out` from `column` on: their sums stay in registers.
#[inline(always)]
fn add_columns<T: Real, C: Cell<T>, const N: usize, const COLUMNS: usize>(
    rows: &[C],
    width: usize,
    factors: &[[T; N]],
    column: usize,
    out: &mut [T],
    out_stride: usize,
) {
    assert!(column + COLUMNS <= width, "no columns to add");
    let mut sums = [[T::zero(); COLUMNS]; N];
    for (row, factors) in rows.chunks_exact(width).zip(factors) {
        let values = &row[column..column + COLUMNS];
        vector::prefetch(values);
        let mut wide = [T::zero(); COLUMNS];
        for c in 0..COLUMNS {
            wide[c] = values[c].widen();
        }
        for n in 0..N {
            for c in 0..COLUMNS {
                sums[n][c] = factors[n].mul_add(wide[c], sums[n][c]);
            }
        }
    }
    for (n, sums) in sums.iter().enumerate() {
        // A slice each: indices of both loops would be vectorized as scattered stores.
        let out = &mut out[n * out_stride + column..][..COLUMNS];
        out.iter_mut().zip(sums).for_each(|(out, &sum)| *out += sum);
    }
}

/// `C = A B` or, with `accumulate`, `C += A B`: `A` is a small batch of rows, of `a_stride` values; `B` is `k × n` and contiguous; `C`
/// has rows of `c_stride`.
pub(crate) fn matmul_small_batch<T: Real>(
    (n, k): (usize, usize),
    c: &mut [T],
    c_stride: usize,
    accumulate: bool,
    (a, a_stride): (&[T], usize),
    b: &[T],
) {
    if !accumulate {
        c.chunks_mut(c_stride).for_each(|row| row[..n].fill(T::zero()));
    }
    let summed = Summed { values: b, width: n, range: 0..k, scales: None };
    add_weighted(summed, a, a_stride, c, c_stride);
}

/// `C += Aᵀ B` of matrices `(rows, width)` with equally many rows: `C` is `[width of A, width of B]`. For a chunk's worth of rows, which
/// stay in the first-level cache.
pub(crate) fn add_outer_products<T: Real>(
    c: &mut [T],
    (a, m): (&[T], usize),
    (b, n): (&[T], usize),
) {
    if a.is_empty() {
        return;
    }
    T::vectorize_batch(
        #[inline(always)]
        |several| {
            let at_a_time = if several { 4 } else { 1 };
            for (i, c) in c.chunks_mut(at_a_time * n).enumerate() {
                let (a, b) = ((&a[at_a_time * i..], m), (b, n));
                match c.len() / n {
                    4 if several => add_outer_rows::<T, 4>(c, a, b),
                    3 if several => add_outer_rows::<T, 3>(c, a, b),
                    2 if several => add_outer_rows::<T, 2>(c, a, b),
                    _ => add_outer_rows::<T, 1>(c, a, b),
                }
            }
        },
    );
}

/// `N` rows of `C`, those of the first columns of `A`.
#[inline(always)]
fn add_outer_rows<T: Real, const N: usize>(c: &mut [T], a: (&[T], usize), b: (&[T], usize)) {
    let mut column = 0;
    if vector::has_many_registers() {
        while column + 64 <= b.1 {
            add_outer_columns::<T, N, 64>(c, a, b, column);
            column += 64;
        }
    }
    while column + 16 <= b.1 {
        add_outer_columns::<T, N, 16>(c, a, b, column);
        column += 16;
    }
    for column in column..b.1 {
        add_outer_columns::<T, N, 1>(c, a, b, column);
    }
}

/// `COLUMNS` columns of them from `column` on: their sums stay in registers.
#[inline(always)]
fn add_outer_columns<T: Real, const N: usize, const COLUMNS: usize>(
    c: &mut [T],
    (a, m): (&[T], usize),
    (b, n): (&[T], usize),
    column: usize,
) {
    let mut sums = [[T::zero(); COLUMNS]; N];
    for (a, b) in a.chunks(m).zip(b.chunks_exact(n)) {
        let (a, b) = (&a[..N], &b[column..column + COLUMNS]);
        for i in 0..N {
            for j in 0..COLUMNS {
                sums[i][j] = a[i].mul_add(b[j], sums[i][j]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        let c = &mut c[i * n + column..][..COLUMNS];
        c.iter_mut().zip(sums).for_each(|(c, &sum)| *c += sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outer_products_are_added() {
        let value = |i: usize| ((i * 7919) as f64 * 0.618).sin();
        for (rows, m, n) in [(0, 4, 16), (1, 1, 1), (60, 128, 64), (7, 6, 5), (13, 11, 83)] {
            let a: Vec<f64> = (0..rows * m).map(value).collect();
            let b: Vec<f64> = (0..rows * n).map(|i| value(i + 1)).collect();
            let mut c: Vec<f64> = (0..m * n).map(|i| value(i + 2)).collect();
            let before = c.clone();
            add_outer_products(&mut c, (&a, m), (&b, n));
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..rows).map(|row| a[row * m + i] * b[row * n + j]).sum();
                    assert!((c[i * n + j] - before[i * n + j] - sum).abs() < 1e-12);
                }
            }
        }
    }
}
