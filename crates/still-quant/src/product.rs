//! Matrix products.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use still_compute::vector;

use crate::batch::{Batch, CHAINS};
use crate::block::Block;
use crate::format::{with_block, with_integer};
use crate::fused::Fused;
use crate::integer::Unit;
use crate::many;
use crate::matrix::{PackedMatrix, PreparedRows};
use crate::tile::{LANES, Part, Words};

/// Rows of `x` that are a small batch: as few as a decode step usually has.
pub const SMALL_BATCH: usize = 8;
/// Rows of `x` up to which products are made of codes in every way that there is; for more, f32 products of values in memory are
/// faster than sums in registers. Fewer than a chunk: whole chunks are multiplied alike, however many are read at a time.
const ON_CODES: usize = 63;
/// Values of the matrix that one thread takes at a time, at least.
const VALUES_PER_TASK: usize = 1 << 15;

/// See [`PackedMatrix::dequantize_into`].
pub fn dequantize(matrix: &PackedMatrix, rows: Range<usize>, out: &mut [f32]) {
    let columns = matrix.columns();
    let tiles = tiles_of(&rows);
    // `out` cut where tiles end.
    let mut parts = Vec::with_capacity(tiles.len());
    let mut rest = out;
    for tile in tiles {
        let lanes = rows.start.max(tile * LANES)..rows.end.min((tile + 1) * LANES);
        let (part, later) = rest.split_at_mut(lanes.len() * columns);
        parts.push((tile, lanes.start - tile * LANES, part));
        rest = later;
    }
    debug_assert!(rest.is_empty());
    parts.into_par_iter().for_each_init(Vec::new, |wide, (tile, lane, out)| {
        widen_tile(matrix, tile, wide);
        for (row, out) in out.chunks_exact_mut(columns).enumerate() {
            pick_lane(wide, lane + row, out);
        }
    });
}

/// See [`PackedMatrix::dequantize_row`].
pub fn dequantize_row(matrix: &PackedMatrix, row: usize, wide: &mut Vec<f32>, out: &mut [f32]) {
    widen_tile(matrix, row / LANES, wide);
    pick_lane(wide, row % LANES, out);
}

/// The values of one tile, `[columns, 16]`.
fn widen_tile(matrix: &PackedMatrix, tile: usize, wide: &mut Vec<f32>) {
    wide.resize(matrix.columns() * LANES, f32::NAN);
    with_block!(matrix.format(), B => Arch::new().dispatch(Widen::<B> {
        tiles: matrix.tiles(tile..tile + 1),
        count: matrix.columns() / B::VALUES,
        step: B::WORDS,
        out: wide,
        out_step: B::VALUES * LANES,
        stride: LANES,
        block: PhantomData,
    }));
}

/// One row of a widened tile.
fn pick_lane(wide: &[f32], lane: usize, out: &mut [f32]) {
    for (out, values) in out.iter_mut().zip(wide.chunks_exact(LANES)) {
        *out = values[lane];
    }
}

/// Widens `count` tiles: tile `i` begins at word `i · step`, and its column `c` goes to `out[i · out_step + c · stride..]`.
pub struct Widen<'a, B> {
    pub tiles: &'a [Words],
    pub count: usize,
    pub step: usize,
    pub out: &'a mut [f32],
    pub out_step: usize,
    pub stride: usize,
    pub block: PhantomData<B>,
}

impl<B: Block> WithSimd for Widen<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for i in 0..self.count {
            let tile = &self.tiles[i * self.step..i * self.step + B::WORDS];
            let out = &mut self.out[i * self.out_step..];
            for part in 0..LANES / S::F32_LANES {
                let at = part * S::F32_LANES;
                let part = Part { simd, tile, part };
                for group in 0..B::VALUES / B::GROUP {
                    let (scale, offset) = B::affine(part, group);
                    for step in 0..B::GROUP / B::STEP {
                        let first = group * B::GROUP + step * B::STEP;
                        B::codes(
                            part,
                            group,
                            step,
                            #[inline(always)]
                            |column, code| {
                                let to = (first + column) * self.stride + at;
                                let (to, _) = S::as_mut_simd_f32s(&mut out[to..to + S::F32_LANES]);
                                to[0] = if B::PLAIN {
                                    code
                                } else {
                                    simd.mul_add_f32s(scale, code, offset)
                                };
                            },
                        );
                    }
                }
            }
        }
    }
}

/// The tiles that have these rows.
pub fn tiles_of(rows: &Range<usize>) -> Range<usize> {
    rows.start / LANES..rows.end.div_ceil(LANES)
}

/// Where products go: memory whose values need not be there yet.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    start: *mut f32,
    length: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: what a thread writes is its own, by the contract of `write`.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub fn new(values: &'a mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), length: values.len(), memory: PhantomData }
    }

    pub fn uninit(values: &'a mut [MaybeUninit<f32>]) -> Self {
        Self { start: values.as_mut_ptr().cast(), length: values.len(), memory: PhantomData }
    }

    /// Writes values from `start` on.
    ///
    /// # Safety
    /// Nobody else writes or reads there.
    #[inline(always)]
    pub unsafe fn write(self, start: usize, values: &[f32]) {
        assert!(start + values.len() <= self.length, "products have no such place");
        // SAFETY: the memory is there, as asserted, and this caller's, by this function's own contract.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(start), values.len());
        }
    }
}

/// See [`PackedMatrix::multiply`], which checks the sizes. Writes every value of `y` `[n, rows]`.
pub fn multiply(matrix: &PackedMatrix, rows: Range<usize>, x: &[f32], y: Output<'_>) {
    let n = x.len() / matrix.columns();
    if n == 0 || rows.is_empty() {
        return;
    }
    if widens(matrix, n) {
        many::multiply(matrix, rows, x, y, Fused::default());
    } else {
        on_codes(matrix, n, rows, x, y);
    }
}

/// Whether products of `n` rows are those of widened values.
pub fn widens(matrix: &PackedMatrix, n: usize) -> bool {
    // Tiles multiply faster than f32 products do, however many rows there are.
    n > ON_CODES && !matrix.integer().is_some_and(Unit::has_tiles)
}

/// Rows of `x` with codes: threads take tiles.
fn on_codes(matrix: &PackedMatrix, n: usize, rows: Range<usize>, x: &[f32], y: Output<'_>) {
    let mut prepared = PreparedRows::default();
    prepare(matrix, x, &mut prepared);
    let tiles = tiles_of(&rows);
    let per_task = VALUES_PER_TASK.div_ceil(matrix.columns() * LANES);
    let tasks = tiles.clone().step_by(per_task).collect::<Vec<_>>();
    tasks.into_par_iter().for_each_init(Vec::new, |by_tile, first| {
        let own = first..(first + per_task).min(tiles.end);
        by_tile.resize(own.len() * n * LANES, f32::NAN);
        multiply_tiles(matrix, own.clone(), x, &prepared, by_tile);
        // Results are by row of x.
        for (tile, values) in own.zip(by_tile.chunks_exact(n * LANES)) {
            let first = tile * LANES;
            let of_tile = rows.start.max(first)..rows.end.min(first + LANES);
            let (from, to) =
                (of_tile.start - first..of_tile.end - first, of_tile.start - rows.start);
            for (i, values) in values.chunks_exact(LANES).enumerate() {
                // SAFETY: every tile has columns of its own.
                unsafe { y.write(i * rows.len() + to, &values[from.clone()]) };
            }
        }
    });
}

/// `Σ x` of each group of columns.
fn group_sums(x: &[f32], group: usize) -> impl Iterator<Item = f32> {
    x.chunks_exact(group).map(vector::sum)
}

/// See [`PackedMatrix::prepare`].
pub fn prepare(matrix: &PackedMatrix, x: &[f32], rows: &mut PreparedRows) {
    if let (Some(unit), Some(order)) = (matrix.integer(), matrix.order()) {
        return unit.digits_into(x, matrix.columns(), order, &mut rows.digits);
    }
    rows.sums.clear();
    with_block!(matrix.format(), B => if !B::PLAIN {
        rows.sums.extend(group_sums(x, B::GROUP));
    });
}

/// See [`PackedMatrix::multiply_tiles`].
pub fn multiply_tiles(
    matrix: &PackedMatrix,
    tiles: Range<usize>,
    x: &[f32],
    prepared: &PreparedRows,
    y: &mut [f32],
) {
    let n = x.len() / matrix.columns();
    let words = matrix.tiles(tiles);
    if let Some(unit) = matrix.integer() {
        let row_words =
            matrix.columns() / matrix.format().block_values() * matrix.format().tile_words();
        let done = with_integer!(matrix.format(), B => unit.multiply::<B>(words, row_words, &prepared.digits, y));
        return done.expect("a format of whole numbers");
    }
    let sums = prepared.sums.as_slice();
    with_block!(matrix.format(), B => {
        let row_words = matrix.columns() / B::VALUES * B::WORDS;
        match n {
            1 => small_batch_tiles::<B, 1>(words, row_words, x, sums, y),
            2 => small_batch_tiles::<B, 2>(words, row_words, x, sums, y),
            3 => small_batch_tiles::<B, 3>(words, row_words, x, sums, y),
            _ => {
                let block = PhantomData;
                Arch::new().dispatch(Batch::<B> { words, row_words, n, x, sums, y, block });
            }
        }
    });
}

/// On this thread, `y` `[tiles, N, 16]`.
fn small_batch_tiles<B: Block, const N: usize>(
    words: &[Words],
    row_words: usize,
    x: &[f32],
    sums: &[f32],
    y: &mut [f32],
) {
    let block = PhantomData;
    Arch::new().dispatch(SmallBatch::<B, N> { words, row_words, x, sums, y, block });
}

/// [`Batch`] of `N` rows, few enough to have all their sums in registers: a code is used as it leaves a tile.
///
/// `Σ (scale · code + offset) x = scale (Σ code · x) + offset (Σ x)`, and `Σ x` of a group is the same for all rows.
struct SmallBatch<'a, B, const N: usize> {
    words: &'a [Words],
    /// Words of a tile's row of blocks.
    row_words: usize,
    x: &'a [f32],
    /// `Σ x` of each group of each row of `x`.
    sums: &'a [f32],
    y: &'a mut [f32],
    block: PhantomData<B>,
}

impl<B: Block, const N: usize> WithSimd for SmallBatch<'_, B, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let columns = self.x.len() / N;
        let rows = self.words.chunks_exact(self.row_words);
        for (words, y) in rows.zip(self.y.chunks_exact_mut(N * LANES)) {
            for part in 0..LANES / S::F32_LANES {
                let at = part * S::F32_LANES;
                let mut total = [simd.splat_f32s(0.0); N];
                for (block, tile) in words.chunks_exact(B::WORDS).enumerate() {
                    if part == 0 {
                        vector::prefetch(tile);
                    }
                    let part = Part { simd, tile, part };
                    for group in 0..B::VALUES / B::GROUP {
                        let first = block * B::VALUES + group * B::GROUP;
                        let x: [&[f32]; N] = std::array::from_fn(|i| {
                            &self.x[i * columns + first..i * columns + first + B::GROUP]
                        });
                        let mut chains = [[simd.splat_f32s(0.0); CHAINS]; N];
                        for step in 0..B::GROUP / B::STEP {
                            B::codes(
                                part,
                                group,
                                step,
                                #[inline(always)]
                                |column, code| {
                                    for i in 0..N {
                                        let chain = &mut chains[i][column % CHAINS];
                                        let x = simd.splat_f32s(x[i][step * B::STEP + column]);
                                        *chain = simd.mul_add_f32s(code, x, *chain);
                                    }
                                },
                            );
                        }
                        let (scale, offset) = B::affine(part, group);
                        for i in 0..N {
                            let mut sum = chains[i][0];
                            for chain in &chains[i][1..] {
                                sum = simd.add_f32s(sum, *chain);
                            }
                            total[i] = if B::PLAIN {
                                simd.add_f32s(total[i], sum)
                            } else {
                                let of_x = self.sums[(i * columns + first) / B::GROUP];
                                let total =
                                    simd.mul_add_f32s(offset, simd.splat_f32s(of_x), total[i]);
                                simd.mul_add_f32s(scale, sum, total)
                            };
                        }
                    }
                }
                for i in 0..N {
                    let y = &mut y[i * LANES + at..i * LANES + at + S::F32_LANES];
                    S::as_mut_simd_f32s(y).0[0] = total[i];
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Format;
    use crate::tile::put;

    /// A matrix of one row of tiles with every bit in use.
    pub(crate) fn tiles<B: Block>(blocks: usize) -> Vec<Words> {
        let mut words = vec![Words::default(); blocks * B::WORDS];
        for block in 0..blocks {
            for lane in 0..LANES {
                let byte = |i: usize| ((i * 89 + lane * 31 + block * 7) % 251) as u8;
                let mut bytes: Vec<u8> = (0..B::BYTES).map(byte).collect();
                // Halves of an ordinary size wherever a format may have them.
                let size = bytes.len();
                for at in [1, 3, size - 1] {
                    bytes[at] = 0x2c;
                }
                B::pack(&bytes, &mut words[block * B::WORDS..(block + 1) * B::WORDS], lane);
            }
        }
        words
    }

    fn on_every_vector_width<B: Block, const N: usize>() {
        let (blocks, columns) = (3, 3 * B::VALUES);
        let words = tiles::<B>(blocks);
        let x: Vec<f32> = (0..N * columns).map(|i| (i as f32 * 0.7).sin()).collect();
        let sums: Vec<f32> = group_sums(&x, B::GROUP).collect();
        let run = |on: &dyn Fn(SmallBatch<'_, B, N>)| {
            let mut y = vec![f32::NAN; N * LANES];
            let (words, row_words, block) = (words.as_slice(), blocks * B::WORDS, PhantomData);
            on(SmallBatch { words, row_words, x: &x, sums: &sums, y: &mut y, block });
            y
        };
        let expected = run(&|product| product.with_simd(pulp::Scalar::new()));
        let size = expected.iter().fold(0.0_f32, |size, y| size.max(y.abs()));
        assert!(size.is_finite() && size > 0.0);
        let check = |name: &str, got: Vec<f32>| {
            for (a, b) in got.iter().zip(&expected) {
                assert!((a - b).abs() <= 2e-5 * size, "{name}: {a} and {b}");
            }
        };
        check("chosen at run time", run(&|product| Arch::new().dispatch(product)));
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            check("AVX2", run(&|product| pulp::Simd::vectorize(simd, product)));
        }
    }

    #[test]
    fn every_vector_width_gives_the_same_products() {
        for format in [
            Format::Bf16,
            Format::F16,
            Format::Q4_0,
            Format::Q4_1,
            Format::Q8_0,
            Format::Q4K,
            Format::Q6K,
        ] {
            with_block!(format, B => {
                on_every_vector_width::<B, 1>();
                on_every_vector_width::<B, 3>();
            });
        }
    }

    /// Rows of `x` alone, as many as [`multiply_tiles`] takes in a register each, and more; of an odd number of tiles.
    #[test]
    fn a_row_has_the_same_products_in_every_batch() {
        fn check<B: Block>(format: Format) {
            let dispatched = |one: SmallBatch<'_, B, 1>| Arch::new().dispatch(one);
            check_on::<B>(format, &dispatched, &|all| Arch::new().dispatch(all));
            // As `multiply_tiles` chooses.
            check_on::<B>(
                format,
                &dispatched,
                &|Batch { words, row_words, n, x, sums, y, .. }| match n {
                    2 => small_batch_tiles::<B, 2>(words, row_words, x, sums, y),
                    3 => small_batch_tiles::<B, 3>(words, row_words, x, sums, y),
                    _ => {
                        let block = PhantomData::<B>;
                        Arch::new().dispatch(Batch { words, row_words, n, x, sums, y, block });
                    }
                },
            );
            let scalar = pulp::Scalar::new();
            check_on::<B>(format, &|one| one.with_simd(scalar), &|all| all.with_simd(scalar));
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                check_on::<B>(format, &|one| pulp::Simd::vectorize(simd, one), &|all| {
                    pulp::Simd::vectorize(simd, all);
                });
            }
        }
        fn check_on<B: Block>(
            format: Format,
            on_one: &dyn Fn(SmallBatch<'_, B, 1>),
            on_all: &dyn Fn(Batch<'_, B>),
        ) {
            let (blocks, tiles, most) = (3, 3, 21);
            let (columns, row_words) = (blocks * B::VALUES, blocks * B::WORDS);
            let words = self::tiles::<B>(tiles * blocks);
            let words = words.as_slice();
            let x: Vec<f32> = (0..most * columns).map(|i| (i as f32 * 0.37).sin()).collect();
            let sums: Vec<f32> = group_sums(&x, B::GROUP).collect();
            let (groups, block) = (columns / B::GROUP, PhantomData);
            let alone: Vec<Vec<f32>> = (0..most)
                .map(|i| {
                    let x = &x[i * columns..(i + 1) * columns];
                    let sums = &sums[i * groups..(i + 1) * groups];
                    let mut y = vec![f32::NAN; tiles * LANES];
                    on_one(SmallBatch { words, row_words, x, sums, y: &mut y, block });
                    y
                })
                .collect();
            assert!(
                alone.iter().flatten().all(|y| y.is_finite()) && alone[0].iter().any(|y| *y != 0.0)
            );
            for n in 1..=most {
                let (x, sums) = (&x[..n * columns], &sums[..n * groups]);
                let mut y = vec![f32::NAN; n * tiles * LANES];
                on_all(Batch { words, row_words, n, x, sums, y: &mut y, block });
                for (tile, y) in y.chunks_exact(n * LANES).enumerate() {
                    for (i, y) in y.chunks_exact(LANES).enumerate() {
                        let expected = &alone[i][tile * LANES..(tile + 1) * LANES];
                        assert_eq!(y, expected, "{format:?}: tile {tile} of row {i} of {n}");
                    }
                }
            }
        }
        for format in [
            Format::Bf16,
            Format::F16,
            Format::Q4_0,
            Format::Q4_1,
            Format::Q8_0,
            Format::Q4K,
            Format::Q6K,
        ] {
            with_block!(format, B => check::<B>(format));
        }
    }

    #[test]
    fn the_portable_code_widens_as_any_other() {
        let mut tile = vec![Words::default(); 5];
        for lane in 0..LANES {
            put(&mut tile, 0, lane, 4 * (lane % 8), 9);
            // 1.5 as a half.
            put(&mut tile, 4, lane, 0, 0x3e00);
        }
        let mut out = vec![f32::NAN; 32 * LANES];
        Widen::<crate::block::Q4_0> {
            tiles: &tile,
            count: 1,
            step: 5,
            out: &mut out,
            out_step: 0,
            stride: LANES,
            block: PhantomData,
        }
        .with_simd(pulp::Scalar::new());
        for lane in 0..LANES {
            for column in 0..32 {
                let quant = if column == lane % 8 { 9.0 } else { 0.0 };
                assert_eq!(out[column * LANES + lane], 1.5 * (quant - 8.0));
            }
        }
    }
}
