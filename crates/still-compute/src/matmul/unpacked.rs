//! Products whose right factor stays in a core's own cache, read as it lies: `gemm` packs both factors first, which takes as long
//! as a product of a few hundred rows itself.

use std::arch::x86_64::*;

use super::Mat;

/// Rows and vectors of 16 columns whose sums fill the registers.
const ROWS: usize = 6;
const VECTORS: usize = 4;
const LANES: usize = 16;

/// Most rows of the right factor, and most values from one to the next: its columns are read row by row, and rows that lie a page
/// apart would evict each other.
const MOST_ROWS: usize = 512;
const MOST_STRIDE: usize = 512;

/// Where a product's result goes.
#[derive(Debug)]
pub(super) struct Output<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
    pub accumulate: bool,
}

/// Whether [`product`] computes a product of these sizes, and faster than the one that packs.
pub(super) fn suits((m, n, k): (usize, usize, usize), b: Mat<'_, f32>) -> bool {
    m > 0
        && k > 0
        && b.col_stride == 1
        && b.row_stride <= MOST_STRIDE
        && k <= MOST_ROWS
        && n >= LANES
        && is_x86_feature_detected!("avx512f")
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
    assert!(is_x86_feature_detected!("avx512f"));
    // SAFETY: the CPU has the feature, and every element that is read or written lies within its slice.
    unsafe { multiply((m, n, k), c, a, b) }
}

/// # Safety
/// `a` and `b` cover their sizes, `c` has `m` rows of `n` values.
#[target_feature(enable = "avx512f")]
unsafe fn multiply(
    (m, n, k): (usize, usize, usize),
    c: Output<'_>,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
) {
    let tile = |row: usize, column: usize| Tile {
        depth: k,
        a: a.data[row * a.row_stride..].as_ptr(),
        a_strides: (a.row_stride, a.col_stride),
        b: b.data[column..].as_ptr(),
        b_stride: b.row_stride,
        c_stride: c.stride,
        accumulate: c.accumulate,
        last: lanes(n - column),
    };
    let whole = n / (VECTORS * LANES) * (VECTORS * LANES);
    for column in (0..n).step_by(VECTORS * LANES) {
        for row in (0..m).step_by(ROWS) {
            let tile = tile(row, column);
            let to = c.values[row * c.stride + column..].as_mut_ptr();
            // SAFETY: by this function's own contract.
            unsafe {
                if column < whole {
                    tile.rows::<VECTORS>(m - row, to);
                } else {
                    for vector in (0..n - column).step_by(LANES) {
                        tile.from(vector, n - column).rows::<1>(m - row, to.add(vector));
                    }
                }
            }
        }
    }
}

/// The first `count` lanes, at most all.
fn lanes(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { (1 << count) - 1 }
}

/// Where the factors of some rows and columns of the result begin.
#[derive(Clone, Copy)]
struct Tile {
    depth: usize,
    a: *const f32,
    /// From row to row, and from column to column.
    a_strides: (usize, usize),
    b: *const f32,
    b_stride: usize,
    c_stride: usize,
    accumulate: bool,
    /// Columns of a tile of one vector.
    last: __mmask16,
}

impl Tile {
    /// The tile of one vector that begins so many columns on, of `columns` that are left.
    fn from(self, vector: usize, columns: usize) -> Self {
        Self { b: self.b.wrapping_add(vector), last: lanes(columns - vector), ..self }
    }

    /// Up to `ROWS` of the `rows` that are left.
    ///
    /// # Safety
    /// The factors and `to` have as many rows, and the columns that `V` and `last` say.
    #[target_feature(enable = "avx512f")]
    unsafe fn rows<const V: usize>(&self, rows: usize, to: *mut f32) {
        // SAFETY: by this function's own contract.
        unsafe {
            match rows {
                1 => self.multiply::<1, V>(to),
                2 => self.multiply::<2, V>(to),
                3 => self.multiply::<3, V>(to),
                4 => self.multiply::<4, V>(to),
                5 => self.multiply::<5, V>(to),
                _ => self.multiply::<ROWS, V>(to),
            }
        }
    }

    /// # Safety
    /// As [`Tile::rows`], of `R` rows.
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply<const R: usize, const V: usize>(&self, to: *mut f32) {
        let seen = if V == 1 { self.last } else { !0 };
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for i in 0..self.depth {
            let mut b = [_mm512_setzero_ps(); V];
            for v in 0..V {
                // SAFETY: row `i` of `b` has these lanes.
                let from = unsafe { self.b.add(i * self.b_stride + v * LANES) };
                b[v] = unsafe { _mm512_maskz_loadu_ps(seen, from) };
            }
            for r in 0..R {
                // SAFETY: row `r` of `a` has a column `i`.
                let x = unsafe { *self.a.add(r * self.a_strides.0 + i * self.a_strides.1) };
                let x = _mm512_set1_ps(x);
                for v in 0..V {
                    sums[r][v] = _mm512_fmadd_ps(x, b[v], sums[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                // SAFETY: row `r` of the result has these lanes.
                unsafe {
                    let to = to.add(r * self.c_stride + v * LANES);
                    let mut sum = sums[r][v];
                    if self.accumulate {
                        sum = _mm512_add_ps(_mm512_maskz_loadu_ps(seen, to), sum);
                    }
                    _mm512_mask_storeu_ps(to, seen, sum);
                }
            }
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
                    println!("this CPU has no AVX-512: nothing to compare");
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
        assert!(!suits((64, 8, 64), Mat::rows(&b, 64)));
        assert!(!suits((0, 64, 64), Mat::rows(&b, 64)) && !suits((64, 64, 0), Mat::rows(&b, 64)));
    }
}
