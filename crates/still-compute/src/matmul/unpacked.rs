//! Products whose right factor stays in a core's own cache, read as it lies: `gemm` packs both factors first, which takes as long
//! as a product of a few hundred rows itself.

use pulp::{Arch, Simd, WithSimd};

use super::Mat;
use super::registers::{self, ROWS};

/// Most rows of the right factor, and most values from one to the next: its columns are read row by row, and rows that lie a page
/// apart would evict each other.
const MOST_ROWS: usize = 512;
const MOST_STRIDE: usize = 512;

/// The narrowest vectors: those of AVX2.
const LEAST_LANES: usize = 8;

/// Where a product's result goes.
#[derive(Debug)]
pub(super) struct Output<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
    pub accumulate: bool,
}

/// Values of a vector on this CPU.
fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    Arch::new().dispatch(Lanes)
}

/// Whether [`product`] computes a product of these sizes, and faster than the one that packs.
pub(super) fn suits((m, n, k): (usize, usize, usize), b: Mat<'_, f32>) -> bool {
    m > 0
        && k > 0
        && b.col_stride == 1
        && b.row_stride <= MOST_STRIDE
        && k <= MOST_ROWS
        && n >= lanes().max(LEAST_LANES)
        && lanes() >= LEAST_LANES
}

/// `C = A B` or `C += A B`, of sizes that [`suits`] has checked and that are within the views.
pub(super) fn product(
    (m, n, k): (usize, usize, usize),
    c: Output<'_>,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
) {
    assert!(b.col_stride == 1 && a.covers(m, k) && b.covers(k, n), "a factor is too small");
    assert!(n <= c.stride && (m - 1) * c.stride + n <= c.values.len(), "the output is too small");
    Arch::new().dispatch(Product { sizes: (m, n, k), c, a, b });
}

/// A product whose every element that is read or written lies within its slice.
struct Product<'a> {
    sizes: (usize, usize, usize),
    c: Output<'a>,
    a: Mat<'a, f32>,
    b: Mat<'a, f32>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.multiply::<S, 4>(simd);
        } else {
            self.multiply::<S, 2>(simd);
        }
    }
}

impl Product<'_> {
    /// `V` vectors of columns at a time.
    #[inline(always)]
    fn multiply<S: Simd, const V: usize>(self, simd: S) {
        let Self { sizes: (m, n, k), c, a, b } = self;
        let width = V * S::F32_LANES;
        let tile = |row: usize, column: usize| Tile {
            depth: k,
            a: Mat { data: &a.data[row * a.row_stride..], ..a },
            b: Mat { data: &b.data[column..], ..b },
            c_stride: c.stride,
            accumulate: c.accumulate,
            last: S::F32_LANES.min(n - column),
        };
        for column in (0..n).step_by(width) {
            for row in (0..m).step_by(ROWS) {
                let to = c.values[row * c.stride + column..].as_mut_ptr();
                if column + width <= n {
                    // SAFETY: the factors and the result have these rows and columns, as was asserted.
                    unsafe { tile(row, column).rows::<S, V>(simd, m - row, to) };
                    continue;
                }
                for vector in (column..n).step_by(S::F32_LANES) {
                    // SAFETY: as above; `last` is what is left of the columns.
                    unsafe {
                        let to = to.add(vector - column);
                        tile(row, vector).rows::<S, 1>(simd, m - row, to);
                    }
                }
            }
        }
    }
}

/// Where the factors of some rows and columns of the result begin.
#[derive(Clone, Copy)]
struct Tile<'a> {
    depth: usize,
    a: Mat<'a, f32>,
    b: Mat<'a, f32>,
    c_stride: usize,
    accumulate: bool,
    /// Columns of a tile of one vector.
    last: usize,
}

impl Tile<'_> {
    /// Up to `ROWS` of the `rows` that are left.
    ///
    /// # Safety
    /// The factors and `to` have as many rows, and the columns that `V` and `last` say.
    #[inline(always)]
    unsafe fn rows<S: Simd, const V: usize>(self, simd: S, rows: usize, to: *mut f32) {
        // SAFETY: by this function's own contract.
        unsafe {
            match rows {
                1 => self.multiply::<S, 1, V>(simd, to),
                2 => self.multiply::<S, 2, V>(simd, to),
                3 => self.multiply::<S, 3, V>(simd, to),
                4 => self.multiply::<S, 4, V>(simd, to),
                5 => self.multiply::<S, 5, V>(simd, to),
                _ => self.multiply::<S, ROWS, V>(simd, to),
            }
        }
    }

    /// # Safety
    /// As [`Tile::rows`], of `R` rows.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const R: usize, const V: usize>(self, simd: S, to: *mut f32) {
        let whole = V > 1 || self.last == S::F32_LANES;
        let sums = if whole && self.a.col_stride == 1 {
            registers::sums::<S, R, V>(simd, self.depth, self.a, self.b)
        } else {
            // SAFETY: by this function's own contract.
            unsafe { self.sums(simd, whole) }
        };
        for r in 0..R {
            for v in 0..V {
                // SAFETY: row `r` of the result has these columns, and nobody else uses them.
                unsafe {
                    let to = to.add(r * self.c_stride + v * S::F32_LANES);
                    let mut sum = sums[r][v];
                    if self.accumulate {
                        sum = simd.add_f32s(load::<S>(simd, to, whole, self.last), sum);
                    }
                    if whole {
                        to.cast::<S::f32s>().write_unaligned(sum);
                    } else {
                        let to = std::slice::from_raw_parts_mut(to, self.last);
                        simd.partial_store_f32s(to, sum);
                    }
                }
            }
        }
    }

    /// [`registers::sums`] of less than a vector, or of columns of `a` that are apart.
    ///
    /// # Safety
    /// As [`Tile::rows`], of `R` rows.
    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const V: usize>(
        self,
        simd: S,
        whole: bool,
    ) -> [[S::f32s; V]; R] {
        let Self { depth, a, b, last, .. } = self;
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        for i in 0..depth {
            let mut columns = [simd.splat_f32s(0.0); V];
            for v in 0..V {
                // SAFETY: row `i` of `b` has these columns.
                columns[v] = unsafe {
                    let from = b.data.as_ptr().add(i * b.row_stride + v * S::F32_LANES);
                    load::<S>(simd, from, whole, last)
                };
            }
            for r in 0..R {
                // SAFETY: row `r` of `a` has a column `i`.
                let x = unsafe { *a.data.as_ptr().add(r * a.row_stride + i * a.col_stride) };
                let x = simd.splat_f32s(x);
                for v in 0..V {
                    sums[r][v] = simd.mul_add_f32s(x, columns[v], sums[r][v]);
                }
            }
        }
        sums
    }
}

/// The values from `from` on: a vector, or the first `last` of one.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn load<S: Simd>(simd: S, from: *const f32, whole: bool, last: usize) -> S::f32s {
    // SAFETY: by this function's own contract.
    unsafe {
        match whole {
            true => from.cast::<S::f32s>().read_unaligned(),
            false => simd.partial_load_f32s(std::slice::from_raw_parts(from, last)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed) as f32 * 0.618).sin()).collect()
    }

    /// Sums in f64, onto what was there if the product accumulates; values between rows stay.
    fn twin(
        (m, n, k): (usize, usize, usize),
        (c, stride, accumulate): (&[f32], usize, bool),
        a: Mat<'_, f32>,
        b: Mat<'_, f32>,
    ) -> Vec<f32> {
        let mut out = c.to_vec();
        let at = |x: Mat<'_, f32>, i: usize, j: usize| {
            f64::from(x.data[i * x.row_stride + j * x.col_stride])
        };
        for i in 0..m {
            for j in 0..n {
                let before = if accumulate { f64::from(c[i * stride + j]) } else { 0.0 };
                let sum: f64 = (0..k).map(|l| at(a, i, l) * at(b, l, j)).sum();
                out[i * stride + j] = (before + sum) as f32;
            }
        }
        out
    }

    #[test]
    fn products_are_those_of_the_twin() {
        for (m, n, k) in [
            (192, 64, 64),
            (6, 64, 1),
            (7, 80, 5),
            (1, 16, 512),
            (5, 17, 3),
            (13, 130, 70),
            (64, 200, 9),
        ] {
            for (a_stride, transposed, accumulate) in
                [(k, false, false), (k + 3, false, true), (m, true, false), (m + 2, true, true)]
            {
                let (b_stride, c_stride) = (n + 5, n + 1);
                let rows = if transposed { k } else { m };
                let (a, b) = (values(rows * a_stride, 1), values(k * b_stride, 2));
                let a = Mat::rows(&a, a_stride);
                let a = if transposed { a.t() } else { a };
                let b = Mat::rows(&b, b_stride);
                let mut c = values(m * c_stride, 3);
                let expected = twin((m, n, k), (&c, c_stride, accumulate), a, b);
                if !suits((m, n, k), b) {
                    println!("this CPU has no vectors of eight values: nothing to compare");
                    return;
                }
                let output = Output { values: &mut c, stride: c_stride, accumulate };
                product((m, n, k), output, a, b);
                for (&x, &y) in c.iter().zip(&expected) {
                    assert!((x - y).abs() < 1e-5 * (k as f32).sqrt(), "{m}x{n}x{k}: {x} for {y}");
                }
            }
        }
    }

    #[test]
    fn what_is_too_far_apart_is_packed() {
        let b = vec![0.0; 1 << 16];
        assert!(!suits((64, 64, 64), Mat::rows(&b, 1024)));
        assert!(!suits((64, 64, 64), Mat::rows(&b, 64).t()));
        // Columns of less than a vector.
        assert!(!suits((64, 7, 64), Mat::rows(&b, 64)));
        assert!(!suits((0, 64, 64), Mat::rows(&b, 64)) && !suits((64, 64, 0), Mat::rows(&b, 64)));
    }
}
