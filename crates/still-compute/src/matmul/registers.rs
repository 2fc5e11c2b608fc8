//! The innermost loop of f32 products: a few rows of the left factor meet a few vectors of columns of the right one, and their sums stay
//! in registers.

use pulp::Simd;

use super::Mat;

/// The most rows whose sums, of as many vectors as a CPU has registers for, leave registers for the factors.
pub const ROWS: usize = 6;

/// Terms of each sum in one turn of the loop, so that counting and addresses take next to none of a turn.
const STEPS: usize = 4;

/// `Σ_i a[r][i] b[i]` of `R` rows of `a` and the first `V` vectors of columns of `b`, of `depth` terms each, added in order.
///
/// For callers within [`Simd::vectorize`] or the like.
///
/// # Panics
/// If a factor has fewer values, or columns that are apart.
#[inline(always)]
pub fn sums<S: Simd, const R: usize, const V: usize>(
    simd: S,
    depth: usize,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
) -> [[S::f32s; V]; R] {
    assert!(a.col_stride == 1 && b.col_stride == 1, "columns are apart");
    assert!(a.covers(R, depth) && b.covers(depth, V * S::F32_LANES), "a factor is too small");
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    // Where there are no vectors the loop is long as it is.
    let whole = if S::F32_LANES > 1 { depth / STEPS * STEPS } else { 0 };
    for i in (0..whole).step_by(STEPS) {
        for step in 0..STEPS {
            // SAFETY: the factors have `depth` terms, as asserted.
            unsafe { add_term(simd, i + step, a, b, &mut sums) };
        }
    }
    for i in whole..depth {
        // SAFETY: as above.
        unsafe { add_term(simd, i, a, b, &mut sums) };
    }
    sums
}

/// Adds `a[r][i] b[i]`.
///
/// # Safety
/// `a` has `R` rows with a column `i`, and row `i` of `b` has `V` vectors of columns.
#[inline(always)]
unsafe fn add_term<S: Simd, const R: usize, const V: usize>(
    simd: S,
    i: usize,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    sums: &mut [[S::f32s; V]; R],
) {
    let mut columns = [simd.splat_f32s(0.0); V];
    for v in 0..V {
        // SAFETY: by this function's own contract.
        columns[v] = unsafe {
            let from = b.data.as_ptr().add(i * b.row_stride + v * S::F32_LANES);
            from.cast::<S::f32s>().read_unaligned()
        };
    }
    for r in 0..R {
        // SAFETY: as above.
        let x = simd.splat_f32s(unsafe { *a.data.as_ptr().add(r * a.row_stride + i) });
        for v in 0..V {
            sums[r][v] = simd.mul_add_f32s(x, columns[v], sums[r][v]);
        }
    }
}
