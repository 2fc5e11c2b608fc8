//! Products of a batch: codes are unpacked once for all rows of `x`.
//!
//! A row's products are bit for bit those that it has alone, whatever the batch: its sums have the same terms in the same order
//! ([`CHAINS`]).

use std::marker::PhantomData;

use pulp::{Simd, WithSimd};
use still_compute::vector;

use crate::block::Block;
use crate::tile::{LANES, Part, Words};

/// Sums that one of a group's columns makes: a column's is its number among those that come at a time, modulo this. A sum's
/// additions wait for each other, and these do not.
pub const CHAINS: usize = 4;

/// Rows of `x` that use a code while it is in a register.
const PASS: usize = 8;

/// The most columns of a group.
const GROUP: usize = 32;

/// `y[tile][i][lane] = x[i] · row` for the `n` rows of `x` and the rows of some tiles.
pub struct Batch<'a, B> {
    pub words: &'a [Words],
    /// Words of a tile's row of blocks.
    pub row_words: usize,
    pub n: usize,
    pub x: &'a [f32],
    /// `Σ x` of each group of each row of `x`.
    pub sums: &'a [f32],
    pub y: &'a mut [f32],
    pub block: PhantomData<B>,
}

impl<B: Block> WithSimd for Batch<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const { assert!(B::GROUP <= GROUP) };
        let Self { words, row_words, n, x, sums, y, .. } = self;
        for (words, y) in words.chunks_exact(row_words).zip(y.chunks_exact_mut(n * LANES)) {
            y.fill(0.0);
            for part in 0..LANES / S::F32_LANES {
                for (block, tile) in words.chunks_exact(B::WORDS).enumerate() {
                    if part == 0 {
                        vector::prefetch(tile);
                    }
                    let of_tile = Part { simd, tile, part };
                    for group in 0..B::VALUES / B::GROUP {
                        let mut codes = [simd.splat_f32s(0.0); GROUP];
                        for step in 0..B::GROUP / B::STEP {
                            B::codes(
                                of_tile,
                                group,
                                step,
                                #[inline(always)]
                                |column, code| codes[step * B::STEP + column] = code,
                            );
                        }
                        let first = block * B::VALUES + group * B::GROUP;
                        let affine = B::affine(of_tile, group);
                        let rows = Rows::<B, S> {
                            simd,
                            codes: &codes,
                            affine,
                            x,
                            columns: x.len() / n,
                            first,
                            sums,
                            at: part * S::F32_LANES,
                            block: PhantomData,
                        };
                        let mut row = 0;
                        while n - row >= PASS {
                            rows.add::<PASS, 1>(row, y);
                            row += PASS;
                        }
                        match n - row {
                            0 => {}
                            1 => rows.add::<1, 4>(row, y),
                            2 => rows.add::<2, 4>(row, y),
                            3 => rows.add::<3, 4>(row, y),
                            4 => rows.add::<4, 2>(row, y),
                            5 => rows.add::<5, 2>(row, y),
                            6 => rows.add::<6, 2>(row, y),
                            _ => rows.add::<7, 2>(row, y),
                        }
                    }
                }
            }
        }
    }
}

/// A group's codes and what they are multiplied by.
struct Rows<'a, B, S: Simd> {
    simd: S,
    codes: &'a [S::f32s; GROUP],
    affine: (S::f32s, S::f32s),
    x: &'a [f32],
    columns: usize,
    /// The group's first column.
    first: usize,
    sums: &'a [f32],
    /// The first of a tile's rows that the vectors have.
    at: usize,
    block: PhantomData<B>,
}

impl<B: Block, S: Simd> Rows<'_, B, S> {
    /// Adds the group's products with `N` rows of `x`, from `row` on, to what `y` has of the groups before; `TOGETHER` chains are
    /// summed at a time.
    #[inline(always)]
    fn add<const N: usize, const TOGETHER: usize>(&self, row: usize, y: &mut [f32]) {
        let Self { simd, codes, columns, first, .. } = *self;
        let x: [&[f32]; N] = std::array::from_fn(|i| {
            &self.x[(row + i) * columns + first..(row + i) * columns + first + B::GROUP]
        });
        let zero = simd.splat_f32s(0.0);
        let mut sum = [zero; N];
        for before in (0..CHAINS).step_by(TOGETHER) {
            let mut chains = [[zero; N]; TOGETHER];
            for step in 0..B::GROUP / B::STEP {
                for column in 0..B::STEP {
                    let chain = column % CHAINS;
                    if chain < before || chain >= before + TOGETHER {
                        continue;
                    }
                    let column = step * B::STEP + column;
                    let chain = &mut chains[chain - before];
                    for i in 0..N {
                        chain[i] = simd.mul_add_f32s(
                            codes[column],
                            simd.splat_f32s(x[i][column]),
                            chain[i],
                        );
                    }
                }
            }
            for (n, chain) in chains.iter().enumerate() {
                for i in 0..N {
                    let first = before == 0 && n == 0;
                    sum[i] = if first { chain[i] } else { simd.add_f32s(sum[i], chain[i]) };
                }
            }
        }
        let (scale, offset) = self.affine;
        for i in 0..N {
            let y = &mut y[(row + i) * LANES + self.at..(row + i) * LANES + self.at + S::F32_LANES];
            let total = &mut S::as_mut_simd_f32s(y).0[0];
            *total = if B::PLAIN {
                simd.add_f32s(*total, sum[i])
            } else {
                let of_x = self.sums[((row + i) * columns + first) / B::GROUP];
                let total = simd.mul_add_f32s(offset, simd.splat_f32s(of_x), *total);
                simd.mul_add_f32s(scale, sum[i], total)
            };
        }
    }
}
