//! Products of a batch: codes are unpacked once for all rows of `x`.
//!
//! A row's products are bit for bit those that it has alone, whatever the batch: its sums have the same terms in the same order
//! ([`CHAINS`]).

use std::marker::PhantomData;

use pulp::bytemuck::{self, Pod};
use pulp::{Simd, WithSimd};
use still_compute::vector;

use crate::block::Block;
use crate::tile::{LANES, Part, Words, turns};

/// Sums that a group's columns make: a column's is its number, modulo this. A sum's additions wait for each other, and these do
/// not.
pub const CHAINS: usize = 2;

/// Vectors of codes that meet a value of `x` each time it is loaded.
const VECTORS: usize = 2;

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

/// A group's codes by column, of up to [`VECTORS`] vectors: as they are loaded, whole lines.
#[repr(align(64))]
struct Codes<T>(T);

impl<B: Block> WithSimd for Batch<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        const { assert!(B::GROUP <= GROUP && B::STEP.is_multiple_of(CHAINS)) };
        self.y.fill(0.0);
        let vectors = self.words.len() / self.row_words * (LANES / S::F32_LANES);
        let mut first = 0;
        while vectors - first >= VECTORS {
            self.multiply::<S, VECTORS>(simd, first);
            first += VECTORS;
        }
        if first < vectors {
            self.multiply::<S, 1>(simd, first);
        }
    }
}

impl<B: Block> Batch<'_, B> {
    /// The products of `V` vectors of the tiles' rows, from vector `first` on.
    #[inline(always)]
    fn multiply<S: Simd, const V: usize>(&mut self, simd: S, first: usize) {
        let (n, columns, row_words) = (self.n, self.x.len() / self.n, self.row_words);
        let parts = LANES / S::F32_LANES;
        // Which tile, and which of its vectors.
        let vectors: [_; V] = std::array::from_fn(|v| ((first + v) / parts, (first + v) % parts));
        let mut codes = Codes([[simd.splat_f32s(0.0); V]; GROUP]);
        for block in 0..row_words / B::WORDS {
            let of_block: [_; V] = std::array::from_fn(|v| {
                let (tile, part) = vectors[v];
                let start = tile * row_words + block * B::WORDS;
                Part { simd, tile: &self.words[start..start + B::WORDS], part }
            });
            for Part { tile, part, .. } in of_block {
                if part == 0 {
                    vector::prefetch(tile);
                }
            }
            for group in 0..B::VALUES / B::GROUP {
                let mut affine = [[simd.splat_f32s(0.0); V]; 2];
                for (v, part) in of_block.into_iter().enumerate() {
                    for step in 0..B::GROUP / B::STEP {
                        B::codes(
                            part,
                            group,
                            step,
                            #[inline(always)]
                            |column, code| codes.0[step * B::STEP + column][v] = code,
                        );
                    }
                    (affine[0][v], affine[1][v]) = B::affine(part, group);
                }
                let start = block * B::VALUES + group * B::GROUP;
                simd.vectorize(Rows::<V> {
                    codes: values(&codes.0[..B::GROUP]),
                    affine: values(&affine),
                    x: &self.x[start..],
                    columns,
                    sums: (!B::PLAIN).then(|| &self.sums[start / B::GROUP..]),
                    y: self.y,
                    places: vectors.map(|(tile, part)| tile * n * LANES + part * S::F32_LANES),
                    n,
                });
            }
        }
    }
}

/// The values of vectors.
fn values<V: Pod, const N: usize>(vectors: &[[V; N]]) -> &[f32] {
    bytemuck::cast_slice(vectors.as_flattened())
}

/// A group's products with all rows of `x`: no part of a format, so that all share the code.
struct Rows<'a, const V: usize> {
    /// By column, `V` vectors each.
    codes: &'a [f32],
    /// Scales, then offsets.
    affine: &'a [f32],
    /// From the group's first column of the first row on.
    x: &'a [f32],
    /// Values of a row.
    columns: usize,
    /// `Σ x` from this group of the first row on; none if codes are values.
    sums: Option<&'a [f32]>,
    y: &'a mut [f32],
    /// Where in `y` the first row's products are.
    places: [usize; V],
    n: usize,
}

impl<const V: usize> WithSimd for Rows<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let many = S::REGISTER_COUNT >= 32;
        for turn in turns(self.n, if many { 6 } else { 3 }) {
            match turn.len() {
                1 => self.add::<S, 1>(simd, turn.start),
                2 => self.add::<S, 2>(simd, turn.start),
                3 => self.add::<S, 3>(simd, turn.start),
                4 if many => self.add::<S, 4>(simd, turn.start),
                5 if many => self.add::<S, 5>(simd, turn.start),
                6 if many => self.add::<S, 6>(simd, turn.start),
                rows => unreachable!("{rows} rows at a time"),
            }
        }
    }
}

impl<const V: usize> Rows<'_, V> {
    /// Adds the products with `N` rows of `x`, from `row` on, to what `y` has of the groups before.
    #[inline(always)]
    fn add<S: Simd, const N: usize>(&mut self, simd: S, row: usize) {
        let codes = S::as_simd_f32s(self.codes).0.as_chunks::<V>().0;
        let (group, columns) = (codes.len(), self.columns);
        let x: [&[[f32; CHAINS]]; N] = std::array::from_fn(|i| {
            let start = (row + i) * columns;
            self.x[start..start + group].as_chunks().0
        });
        let mut chains = [[[simd.splat_f32s(0.0); V]; N]; CHAINS];
        for (step, codes) in codes.as_chunks::<CHAINS>().0.iter().enumerate() {
            for chain in 0..CHAINS {
                for i in 0..N {
                    let x = simd.splat_f32s(x[i][step][chain]);
                    for v in 0..V {
                        let sum = &mut chains[chain][i][v];
                        *sum = simd.mul_add_f32s(codes[chain][v], x, *sum);
                    }
                }
            }
        }
        let [mut sums, others @ ..] = chains;
        for chain in others {
            for i in 0..N {
                for v in 0..V {
                    sums[i][v] = simd.add_f32s(sums[i][v], chain[i][v]);
                }
            }
        }
        let affine = S::as_simd_f32s(self.affine).0.as_chunks::<V>().0;
        let of_x: Option<[f32; N]> = self.sums.map(|sums| {
            let groups = columns / group;
            std::array::from_fn(|i| sums[(row + i) * groups])
        });
        for v in 0..V {
            let place = self.places[v] + row * LANES;
            // The last row's end is that of the tile's part.
            let y = &mut self.y[place..place + (N - 1) * LANES + S::F32_LANES];
            for i in 0..N {
                let y = &mut S::as_mut_simd_f32s(&mut y[i * LANES..i * LANES + S::F32_LANES]).0[0];
                *y = match of_x {
                    None => simd.add_f32s(*y, sums[i][v]),
                    Some(of_x) => {
                        let y = simd.mul_add_f32s(affine[1][v], simd.splat_f32s(of_x[i]), *y);
                        simd.mul_add_f32s(affine[0][v], sums[i][v], y)
                    }
                };
            }
        }
    }
}
