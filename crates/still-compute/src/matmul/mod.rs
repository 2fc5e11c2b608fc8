//! Matrix products over strided views.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::real::Real;
use crate::uninit::new_vec;
use crate::vector;

pub mod registers;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod unpacked;

pub use tiles::Tiles;

/// A strided read-only matrix: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    /// The values.
    pub data: &'a [T],
    /// Values from one row to the next.
    pub row_stride: usize,
    /// Values from one column to the next.
    pub col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Rows of `row_stride` values.
    pub fn rows(data: &'a [T], row_stride: usize) -> Self {
        Self { data, row_stride, col_stride: 1 }
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// The same, if its values are f32.
    #[cfg(target_arch = "x86_64")]
    fn as_f32s(self) -> Option<Mat<'a, f32>>
    where
        T: Real,
    {
        let Self { row_stride, col_stride, .. } = self;
        T::as_f32s(self.data).map(|data| Mat { data, row_stride, col_stride })
    }

    fn covers(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// `C = A B` or, with `accumulate`, `C += A B`, on this thread.
///
/// `A` is `m × k`, `B` is `k × n`, `C` has rows of `c_stride` values.
///
/// # Panics
/// If a view or `c` is too small for its sizes.
pub fn matmul<T: Real>(
    sizes: (usize, usize, usize),
    c: &mut [T],
    c_stride: usize,
    accumulate: bool,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(b) = b.as_f32s().filter(|&b| unpacked::suits(sizes, b))
        && let (Some(a), Some(values)) = (a.as_f32s(), T::as_f32s_mut(c))
    {
        let c = unpacked::Output { values, stride: c_stride, accumulate };
        return unpacked::product(sizes, c, a, b);
    }
    product(sizes, c, c_stride, accumulate, T::one(), a, b, gemm::Parallelism::None);
}

/// [`matmul`] on every thread of rayon's pool.
///
/// # Panics
/// As [`matmul`].
pub fn par_matmul<T: Real>(
    sizes: (usize, usize, usize),
    c: &mut [T],
    c_stride: usize,
    accumulate: bool,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) {
    par_matmul_scaled(sizes, c, c_stride, accumulate, T::one(), a, b);
}

/// [`par_matmul`] of `scale · A B`.
///
/// # Panics
/// As [`matmul`].
pub fn par_matmul_scaled<T: Real>(
    sizes: (usize, usize, usize),
    c: &mut [T],
    c_stride: usize,
    accumulate: bool,
    scale: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) {
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    product(sizes, c, c_stride, accumulate, scale, a, b, threads);
}

/// The product of [`par_matmul`] in a new vector, `[m, n]`, whose memory is not zeroed first.
///
/// # Panics
/// As [`matmul`].
pub fn par_matmul_new<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) -> Vec<T> {
    if k == 0 {
        return vec![T::zero(); m * n];
    }
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    assert!(a.covers(m, k), "left matrix is smaller than {m}x{k}");
    assert!(b.covers(k, n), "right matrix is smaller than {k}x{n}");
    let write = |c: &mut [MaybeUninit<T>]| {
        // SAFETY: the operands cover their sizes; `c` has room for m·n values, of which the product reads none (`read_dst` is false).
        unsafe {
            multiply((m, n, k), c.as_mut_ptr().cast(), n, false, T::one(), a, b, threads);
        }
    };
    // SAFETY: the product writes all of them, as k is positive.
    unsafe { new_vec(m * n, write) }
}

/// `y = x Wᵀ` for a small batch: `x` `[m, k]`, `w` `[n, k]`, `y` `[m, n]`. Each row of `w` is read once, so that its memory's
/// speed is the limit.
///
/// # Panics
/// If the sizes do not fit.
pub fn par_small_batch<T: Real>(w: &[T], k: usize, x: &[T], y: &mut [T]) {
    const ROWS: usize = 16;
    let (n, m) = (w.len() / k, x.len() / k);
    assert_eq!(y.len(), m * n, "y is not {m}x{n}");
    let dots = |w: &[T], out: &mut [T]| {
        T::vectorize(
            #[inline(always)]
            || {
                for (row, out) in w.chunks_exact(k).zip(out.chunks_exact_mut(m)) {
                    for (x, out) in x.chunks_exact(k).zip(out) {
                        *out = vector::dot(row, x);
                    }
                }
            },
        );
    };
    if m == 1 {
        y.par_chunks_mut(ROWS).zip(w.par_chunks(ROWS * k)).for_each(|(y, w)| dots(w, y));
        return;
    }
    let mut transposed = vec![T::zero(); m * n];
    transposed.par_chunks_mut(ROWS * m).zip(w.par_chunks(ROWS * k)).for_each(|(y, w)| dots(w, y));
    transpose(&transposed, m, y);
}

/// Writes the transpose of `x`, whose rows have `columns` values, into `y`.
fn transpose<T: Copy>(x: &[T], columns: usize, y: &mut [T]) {
    let rows = x.len() / columns;
    for (row, values) in x.chunks_exact(columns).enumerate() {
        for (column, &value) in values.iter().enumerate() {
            y[column * rows + row] = value;
        }
    }
}

fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    c: &mut [T],
    c_stride: usize,
    accumulate: bool,
    scale: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    parallelism: gemm::Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.covers(m, k), "left matrix is smaller than {m}x{k}");
    assert!(b.covers(k, n), "right matrix is smaller than {k}x{n}");
    assert!((m - 1) * c_stride + n <= c.len() && n <= c_stride, "output is smaller than {m}x{n}");
    if k == 0 {
        if !accumulate {
            c.chunks_mut(c_stride).take(m).for_each(|row| row[..n].fill(T::zero()));
        }
        return;
    }
    // SAFETY: the assertions above bound every element that the product reads or writes, and `c`
    // is borrowed mutably, so it cannot overlap `a` or `b`.
    unsafe { multiply((m, n, k), c.as_mut_ptr(), c_stride, accumulate, scale, a, b, parallelism) }
}

/// # Safety
/// `a` and `b` cover `m × k` and `k × n`; `c` points to `m` rows of `c_stride` values, `n` of them writable, and
/// initialised if they are accumulated to; it overlaps neither operand.
unsafe fn multiply<T: Real>(
    (m, n, k): (usize, usize, usize),
    c: *mut T,
    c_stride: usize,
    accumulate: bool,
    scale: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    parallelism: gemm::Parallelism,
) {
    // SAFETY: by this function's own contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
