//! What is computed along with products of many rows, while the matrix's values lie in a cache and the products in registers: as steps of
//! their own each would pass over all products once more.

use pulp::{Simd, WithSimd};

use crate::matrix::PackedMatrix;

/// What else is computed with products `y = x Wᵀ`, `[n, rows]`; by default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fused<'a> {
    /// What is added to `W`.
    pub update: Option<LowRank<'a>>,
    /// What becomes of `y` and the products with another matrix.
    pub gated: Option<Gated<'a>>,
    /// Added to the result, `[n, rows]`.
    pub onto: Option<&'a [f32]>,
}

/// A low-rank update of a matrix, `scale · B A`.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `A`, `[rank, columns]`
    pub a: &'a [f32],
    /// `B`, `[rows, rank]`
    pub b: &'a [f32],
    /// What their product is multiplied by.
    pub scale: f32,
}

/// What gates the products of a matrix.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// The other matrix, of the same sizes.
    pub up: &'a PackedMatrix,
    /// Turns some products with the first matrix into results, given those with `up`: value by value, since it is called with some of
    /// them at a time.
    pub activate: &'a (dyn Fn(&mut [f32], &[f32]) + Sync),
}

impl std::fmt::Debug for Gated<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gated").field("up", self.up).finish_non_exhaustive()
    }
}

/// Terms of an update that are added at a time.
const TERMS: usize = 4;

impl LowRank<'_> {
    /// `rank` of an update of a matrix of so many rows and columns.
    ///
    /// # Panics
    /// If the update is none of such a matrix.
    pub(crate) fn rank(&self, rows: usize, columns: usize) -> usize {
        let rank = self.a.len() / columns;
        assert_eq!(self.a.len(), rank * columns, "A is not [{rank}, {columns}]");
        assert_eq!(self.b.len(), rows * rank, "B is not [{rows}, {rank}]");
        rank
    }
}

/// Adds an update to a panel's values.
pub(crate) struct AddUpdate<'a, const V: usize> {
    pub update: LowRank<'a>,
    /// The panel's first row of the matrix.
    pub first: usize,
    /// `[columns, V]`
    pub widened: &'a mut [f32],
}

impl<const V: usize> WithSimd for AddUpdate<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { update: LowRank { a, b, scale }, first, widened } = self;
        let width = V * S::F32_LANES;
        let rank = a.len() / (widened.len() / width);
        if rank == 0 {
            return;
        }
        // `scale · Bᵀ` of the panel's rows; those that the matrix lacks stay as they are.
        let mut transposed = vec![0.0; rank * width];
        for (lane, row) in b[first * rank..].chunks_exact(rank).take(width).enumerate() {
            for (to, &x) in transposed.chunks_exact_mut(width).zip(row) {
                to[lane] = scale * x;
            }
        }
        let whole = rank / TERMS * TERMS;
        for term in (0..whole).step_by(TERMS) {
            add_terms::<S, V, TERMS>(simd, (a, &transposed), term, widened);
        }
        for term in whole..rank {
            add_terms::<S, V, 1>(simd, (a, &transposed), term, widened);
        }
    }
}

/// Adds `N` terms of `Aᵀ` `[rank, columns]` and `b` `[rank, V]`, those from `term` on.
#[inline(always)]
fn add_terms<S: Simd, const V: usize, const N: usize>(
    simd: S,
    (a, b): (&[f32], &[f32]),
    term: usize,
    widened: &mut [f32],
) {
    let width = V * S::F32_LANES;
    let columns = widened.len() / width;
    let a: [&[f32]; N] =
        std::array::from_fn(|n| &a[(term + n) * columns..(term + n + 1) * columns]);
    let b: [[S::f32s; V]; N] = std::array::from_fn(|n| {
        let (b, _) = S::as_simd_f32s(&b[(term + n) * width..(term + n + 1) * width]);
        std::array::from_fn(|v| b[v])
    });
    for (column, values) in widened.chunks_exact_mut(width).enumerate() {
        let (values, _) = S::as_mut_simd_f32s(values);
        // In registers until all terms are added.
        let mut sums: [S::f32s; V] = std::array::from_fn(|v| values[v]);
        for n in 0..N {
            let a = simd.splat_f32s(a[n][column]);
            for v in 0..V {
                sums[v] = simd.mul_add_f32s(a, b[n][v], sums[v]);
            }
        }
        values.copy_from_slice(&sums);
    }
}
