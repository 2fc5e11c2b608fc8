//! `Y = X Wᵀ` of many f32 rows on a CPU with AMX, whose tiles multiply bf16 numbers alone.
//!
//! A f32 number is the sum of three bf16 ones, its digits: the first 8 significant bits, the next 8, and the rest. Of the nine
//! products of two such sums six are made; what is left out is below the last bit of the largest. Sums are f32.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::amx::{Unit, multiplies};

#[cfg(target_arch = "x86_64")]
#[path = "tiles_x86.rs"]
mod kernels;

/// No CPU of this architecture has them.
#[cfg(not(target_arch = "x86_64"))]
mod kernels {
    use super::{MaybeUninit, Tile};

    pub fn narrows() -> bool {
        false
    }

    pub unsafe fn split(_: &[f32], _: usize, _: &mut [MaybeUninit<Tile>]) {
        unreachable!("there is no proof that this CPU has tiles");
    }

    pub unsafe fn split_transposed(_: &[f32], _: usize, _: &mut [MaybeUninit<Tile>]) {
        unreachable!("there is no proof that this CPU has tiles");
    }

    pub unsafe fn multiply(
        _: &[MaybeUninit<Tile>],
        _: &[MaybeUninit<Tile>],
        _: usize,
        _: &mut [f32],
        _: usize,
    ) {
        unreachable!("there is no proof that this CPU has tiles");
    }
}

/// Rows of a tile.
const SIDE: usize = 16;
/// Columns of a tile.
const DEPTH: usize = 32;
/// Tiles of 16 rows and 32 columns of f32 numbers.
const DIGITS: usize = 3;
/// Rows whose products are made together.
const BLOCK: usize = 2 * SIDE;

/// A digit of 16 rows and 32 columns: of the left factor row by row, of the right one by pairs of columns, each of 16 rows.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct Tile([u16; SIDE * DEPTH]);

/// Bytes of the left factor in tiles: half of a core's second cache.
const CACHE: usize = 1 << 20;
/// Most rows of the left factor in tiles.
const MOST_ROWS: usize = 256;

/// Proof that this CPU multiplies f32 rows in tiles, and that the system lets this process do so.
#[derive(Clone, Copy, Debug)]
pub struct Tiles(());

impl Tiles {
    /// If this CPU does.
    pub fn find() -> Option<Self> {
        (kernels::narrows() && multiplies(Unit::Bf16)).then_some(Self(()))
    }

    /// `y = x wᵀ` on every thread of rayon's pool: `x` `[m, k]`, `w` `[n, k]`, `y` `[m, n]`, of which every value is written.
    ///
    /// A row of `y` does not depend on the other rows of `x`. Numbers above 3.38e38, which are next to no finite bf16 number, make
    /// infinity or NaN; those below 1e-38 count as 0.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn linear(self, (m, n, k): (usize, usize, usize), x: &[f32], w: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), m * k, "x is not {m}x{k}");
        assert_eq!(w.len(), n * k, "w is not {n}x{k}");
        assert_eq!(y.len(), m * n, "y is not {m}x{n}");
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            return y.fill(0.0);
        }
        let strip = k.div_ceil(DEPTH) * DIGITS;
        let mut columns = Vec::new();
        columns.resize_with(n.div_ceil(BLOCK) * 2 * strip, MaybeUninit::uninit);
        columns.par_chunks_exact_mut(strip).enumerate().for_each(|(index, tiles)| {
            let rows = rows_of(w, index, k);
            // SAFETY: `self` proves that the CPU has the features; `tiles` are those of `k` columns.
            unsafe { kernels::split_transposed(rows, k, tiles) };
        });
        let columns = &columns;
        let rows = CACHE / (strip * size_of::<Tile>() / SIDE) / BLOCK * BLOCK;
        let rows = rows.clamp(BLOCK, MOST_ROWS);
        y.par_chunks_mut(rows * n).zip(x.par_chunks(rows * k)).for_each_init(
            Vec::new,
            |tiles, (y, x)| {
                let strips = (x.len() / k).div_ceil(BLOCK) * 2;
                tiles.resize_with(strips * strip, MaybeUninit::uninit);
                for (index, tiles) in tiles.chunks_exact_mut(strip).enumerate() {
                    // SAFETY: as above.
                    unsafe { kernels::split(rows_of(x, index, k), k, tiles) };
                }
                // SAFETY: all tiles of both factors are written, and `self` proves that the CPU multiplies them.
                unsafe { kernels::multiply(tiles, columns, strip, y, n) };
            },
        );
    }
}

/// The rows `16 index ..` of `x`, at most 16.
fn rows_of(x: &[f32], index: usize, k: usize) -> &[f32] {
    let at = |index: usize| (index * SIDE * k).min(x.len());
    &x[at(index)..at(index + 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 7919 + seed) as f32 * 0.618).sin();
        (0..count).map(|i| value(i) * (1.0 + value(3 * i + 1) * 9.0)).collect()
    }

    /// The products in f64, and what they are of without signs.
    fn twin((m, n, k): (usize, usize, usize), x: &[f32], w: &[f32]) -> Vec<(f64, f64)> {
        let mut y = Vec::with_capacity(m * n);
        for x in x.chunks_exact(k) {
            for w in w.chunks_exact(k) {
                let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                y.push(products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs())));
            }
        }
        y
    }

    #[test]
    fn products_are_as_exact_as_those_of_f32() {
        let Some(tiles) = Tiles::find() else { return };
        for sizes in [
            (1, 1, 1),
            (16, 16, 32),
            (33, 47, 31),
            (64, 32, 64),
            (40, 100, 65),
            (300, 70, 97),
            (17, 16, 3000),
        ] {
            let (m, n, k) = sizes;
            let (x, w) = (values(m * k, 1), values(n * k, 2));
            let mut y = vec![f32::NAN; m * n];
            tiles.linear(sizes, &x, &w, &mut y);
            let (mut squares, mut sizes_squared) = (0.0, 0.0);
            for (i, (&y, (exact, size))) in y.iter().zip(twin(sizes, &x, &w)).enumerate() {
                let difference = (f64::from(y) - exact).abs();
                assert!(difference <= 2e-6 * size, "{sizes:?}: {y} for {exact} at {i}");
                squares += difference * difference;
                sizes_squared += exact * exact;
            }
            assert!(squares <= 1e-12 * sizes_squared, "{sizes:?}: {squares} of {sizes_squared}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let Some(tiles) = Tiles::find() else { return };
        let (m, n, k) = (290, 33, 70);
        let (x, w) = (values(m * k, 3), values(n * k, 4));
        let (mut all, mut one) = (vec![f32::NAN; m * n], vec![f32::NAN; n]);
        tiles.linear((m, n, k), &x, &w, &mut all);
        for row in [0, 15, 16, 31, 255, 256, 289] {
            tiles.linear((1, n, k), &x[row * k..(row + 1) * k], &w, &mut one);
            assert_eq!(one, all[row * n..(row + 1) * n]);
        }
    }

    #[test]
    fn not_a_number_stays_so_and_stays_in_its_row() {
        let Some(tiles) = Tiles::find() else { return };
        let (m, n, k) = (20, 18, 40);
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut x, w) = (values(m * k, 5), vec![0.7; n * k]);
            x[3 * k + 7] = bad;
            let mut y = vec![0.0; m * n];
            tiles.linear((m, n, k), &x, &w, &mut y);
            for (i, y) in y.iter().enumerate() {
                assert_eq!(y.is_finite(), i / n != 3, "{bad} at {i}");
            }
        }
    }

    #[test]
    fn nothing_is_multiplied_of_no_rows_and_no_columns() {
        let Some(tiles) = Tiles::find() else { return };
        tiles.linear((0, 2, 3), &[], &[1.0; 6], &mut []);
        let mut y = [f32::NAN; 6];
        tiles.linear((2, 3, 0), &[], &[], &mut y);
        assert_eq!(y, [0.0; 6]);
    }
}
