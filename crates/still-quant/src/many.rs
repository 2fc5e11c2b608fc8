//! Products of many rows of `x`: some tiles are widened to f32 values, and all rows meet them while they lie in the second-level
//! cache.
//!
//! Widened, a tile's columns lie one after the other, as the kernel reads them: no factor is packed. A sum has its terms in the order
//! of columns, so that a row's products do not depend on the others. [`Fused`] is computed on the way.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd, bytemuck};
use rayon::prelude::*;
use still_compute::matmul::Mat;
use still_compute::matmul::registers::{self, ROWS};

use crate::block::Block;
use crate::format::with_block;
use crate::fused::{AddUpdate, Fused, Gated};
use crate::matrix::PackedMatrix;
use crate::product::{Output, Widen, tiles_of};
use crate::tile::{LANES, Words, turns};

/// Values that a thread widens at a time: an eighth of a megabyte, which leaves most of the second cache to `x` and its products.
const STRETCH: usize = 1 << 15;

thread_local! {
    /// A thread's memory for the values of a matrix, and of that whose products it gates. Fresh memory would be zeroed, and brought in
    /// page by page, for every product.
    static WIDENED: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// The most rows of the matrix in a panel.
const WIDEST: usize = 4 * LANES;

/// Tiles of a panel: those whose sums with [`ROWS`] rows of `x` fill the registers.
fn panel_tiles() -> usize {
    struct Tiles;
    impl WithSimd for Tiles {
        type Output = usize;
        fn with_simd<S: Simd>(self, _: S) -> usize {
            if wide::<S>() { WIDEST / LANES } else { 1 }
        }
    }
    Arch::new().dispatch(Tiles)
}

/// Whether a vector has sixteen values, and there are registers for 24 of them.
fn wide<S: Simd>() -> bool {
    S::F32_LANES == LANES && S::REGISTER_COUNT >= 32
}

/// `y = x Wᵀ` for rows `rows` of the matrix, on all threads. The sizes of what is `fused` are checked, and its other matrix has this
/// one's format.
pub fn multiply(
    matrix: &PackedMatrix,
    rows: Range<usize>,
    x: &[f32],
    y: Output<'_>,
    fused: Fused<'_>,
) {
    let (columns, panel) = (matrix.columns(), panel_tiles());
    let matrices = 1 + usize::from(fused.gated.is_some());
    let panels = (STRETCH / (matrices * columns * panel * LANES)).max(1);
    let tiles = tiles_of(&rows);
    let stretches = tiles.clone().into_par_iter().step_by(panels * panel);
    stretches.for_each(|first| {
        let mut widened = WIDENED.take();
        let tiles = first..(first + panels * panel).min(tiles.end);
        let words = [Some(matrix), fused.gated.map(|gated| gated.up)]
            .map(|matrix| matrix.map_or(&[][..], |matrix| matrix.tiles(tiles.clone())));
        with_block!(matrix.format(), B => Arch::new().dispatch(Stretch::<B> {
            words,
            columns,
            first: tiles.start * LANES,
            rows: rows.clone(),
            x,
            widened: &mut widened,
            y,
            fused,
            block: PhantomData,
        }));
        WIDENED.set(widened);
    });
}

/// Some tiles, and what a thread does with them.
struct Stretch<'a, B> {
    /// Of the matrix, and of that whose products it gates.
    words: [&'a [Words]; 2],
    columns: usize,
    /// The first tile's first row of the matrix.
    first: usize,
    /// The matrix' rows that are asked for.
    rows: Range<usize>,
    x: &'a [f32],
    /// Memory for the values.
    widened: &'a mut [Vec<f32>; 2],
    /// `[n, rows]`; those of these tiles are this thread's.
    y: Output<'a>,
    fused: Fused<'a>,
    block: PhantomData<B>,
}

impl<B: Block> WithSimd for Stretch<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 if wide::<S>() => self.multiply::<S, { WIDEST / 16 }>(simd),
            16 => self.multiply::<S, { LANES / 16 }>(simd),
            8 => self.multiply::<S, { LANES / 8 }>(simd),
            4 => self.multiply::<S, { LANES / 4 }>(simd),
            1 => self.multiply::<S, LANES>(simd),
            lanes => unreachable!("vectors of {lanes} values"),
        }
    }
}

impl<B: Block> Stretch<'_, B> {
    /// In panels of `V` vectors.
    #[inline(always)]
    fn multiply<S: Simd, const V: usize>(self, simd: S) {
        let (columns, width) = (self.columns, V * S::F32_LANES);
        let [words, up_words] = self.words;
        let [widened, up] = self.widened;
        let widened = widen_panels::<B, S>(simd, words, (columns, width), widened);
        let up = widen_panels::<B, S>(simd, up_words, (columns, width), up);
        if let Some(update) = self.fused.update {
            for (panel, widened) in widened.chunks_exact_mut(columns * width).enumerate() {
                let first = self.first + panel * width;
                simd.vectorize(AddUpdate::<V> { update, first, widened });
            }
        }
        for turn in turns(self.x.len() / columns, ROWS) {
            for (panel, widened) in widened.chunks_exact(columns * width).enumerate() {
                let first = self.first + panel * width;
                let asked = self.rows.start.max(first)..self.rows.end.min(first + width);
                let up = up.chunks_exact(columns * width).nth(panel);
                simd.vectorize(Products::<V> {
                    columns,
                    x: &self.x[turn.start * columns..turn.end * columns],
                    widened,
                    gated: self.fused.gated.zip(up),
                    lanes: asked.start - first..asked.end - first,
                    onto: self.fused.onto,
                    y: self.y,
                    to: turn.start * self.rows.len() + asked.start - self.rows.start,
                    y_stride: self.rows.len(),
                });
            }
        }
    }
}

/// The values of some tiles in panels of `width` rows, `[columns, width]` each, in `memory`.
#[inline(always)]
fn widen_panels<'a, B: Block, S: Simd>(
    simd: S,
    words: &[Words],
    (columns, width): (usize, usize),
    memory: &'a mut Vec<f32>,
) -> &'a mut [f32] {
    let row_words = columns / B::VALUES * B::WORDS;
    let panel_words = row_words * (width / LANES);
    let panels = words.len().div_ceil(panel_words);
    // Rows that the last panel may lack have no values, and their products go nowhere.
    let values = panels * columns * width;
    if memory.len() < values {
        memory.resize(values, 0.0);
    }
    let widened = &mut memory[..values];
    let of_panels = widened.chunks_exact_mut(columns * width);
    for (words, widened) in words.chunks(panel_words).zip(of_panels) {
        for (block, out) in widened.chunks_exact_mut(B::VALUES * width).enumerate() {
            Widen::<B> {
                tiles: &words[block * B::WORDS..],
                count: words.len() / row_words,
                step: row_words,
                out,
                out_step: LANES,
                stride: width,
                block: PhantomData,
            }
            .with_simd(simd);
        }
    }
    widened
}

/// Products of up to [`ROWS`] rows of `x` with a panel.
struct Products<'a, const V: usize> {
    columns: usize,
    x: &'a [f32],
    /// The panel's values, `[columns, V]`.
    widened: &'a [f32],
    /// What becomes of its products and those of a panel of another matrix.
    gated: Option<(Gated<'a>, &'a [f32])>,
    /// The panel's rows that are asked for.
    lanes: Range<usize>,
    /// What products are added to, where they go.
    onto: Option<&'a [f32]>,
    /// Those of the panel's rows are this thread's.
    y: Output<'a>,
    /// Where the first row's products go, and how far from there the next one's.
    to: usize,
    y_stride: usize,
}

impl<const V: usize> WithSimd for Products<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.x.len() / self.columns {
            1 => self.multiply::<S, 1>(simd),
            2 => self.multiply::<S, 2>(simd),
            3 => self.multiply::<S, 3>(simd),
            4 => self.multiply::<S, 4>(simd),
            5 => self.multiply::<S, 5>(simd),
            ROWS => self.multiply::<S, ROWS>(simd),
            rows => unreachable!("{rows} rows at a time"),
        }
    }
}

impl<const V: usize> Products<'_, V> {
    #[inline(always)]
    fn multiply<S: Simd, const R: usize>(self, simd: S) {
        let width = V * S::F32_LANES;
        let x = Mat::rows(self.x, self.columns);
        let sums_of =
            |panel| registers::sums::<S, R, V>(simd, self.columns, x, Mat::rows(panel, width));
        let mut sums = sums_of(self.widened);
        if let Some((gated, up)) = self.gated {
            // In memory for this call: sums that are gated by nothing never leave their registers.
            let (mut values, up) = (sums, sums_of(up));
            let of_values = bytemuck::cast_slice_mut(values.as_flattened_mut());
            (gated.activate)(of_values, bytemuck::cast_slice(up.as_flattened()));
            sums = values;
        }
        for (r, sums) in sums.into_iter().enumerate() {
            self.write(simd, self.to + r * self.y_stride, sums);
        }
    }

    /// Writes a row's products from `start` on.
    #[inline(always)]
    fn write<S: Simd>(&self, simd: S, start: usize, mut sums: [S::f32s; V]) {
        let onto = self.onto.map(|onto| &onto[start..start + self.lanes.len()]);
        if self.lanes.len() == V * S::F32_LANES {
            if let Some(onto) = onto {
                let (onto, _) = S::as_simd_f32s(onto);
                for v in 0..V {
                    sums[v] = simd.add_f32s(sums[v], onto[v]);
                }
            }
            // SAFETY: every row has columns of its own, and those of this panel are this thread's.
            unsafe { self.y.write(start, bytemuck::cast_slice(&sums)) };
        } else {
            let values: &mut [f32] = bytemuck::cast_slice_mut(&mut sums);
            let values = &mut values[self.lanes.clone()];
            if let Some(onto) = onto {
                values.iter_mut().zip(onto).for_each(|(value, onto)| *value += onto);
            }
            // SAFETY: as above.
            unsafe { self.y.write(start, values) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;
    use crate::product::tests::tiles;

    const FORMATS: [Format; 7] = [
        Format::Bf16,
        Format::F16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q8_0,
        Format::Q4K,
        Format::Q6K,
    ];

    /// Products of 70 rows, in part of the last panel's, on every vector width: sums in f64 of the widened values, and a row's the same
    /// in every number of rows.
    fn check<B: Block>(format: Format) {
        let (blocks, all, most) = (3, 5, 9);
        let columns = blocks * B::VALUES;
        let words = tiles::<B>(all * blocks);
        let x: Vec<f32> = (0..most * columns).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut wide = vec![f32::NAN; all * LANES * columns];
        for (tile, words) in words.chunks_exact(blocks * B::WORDS).enumerate() {
            let mut values = vec![f32::NAN; columns * LANES];
            Widen::<B> {
                tiles: words,
                count: blocks,
                step: B::WORDS,
                out: &mut values,
                out_step: B::VALUES * LANES,
                stride: LANES,
                block: PhantomData,
            }
            .with_simd(pulp::Scalar::new());
            for (i, value) in values.into_iter().enumerate() {
                wide[(tile * LANES + i % LANES) * columns + i / LANES] = value;
            }
        }
        let run = |rows: Range<usize>, n: usize, on: &dyn Fn(Stretch<'_, B>)| {
            let mut y = vec![f32::NAN; n * rows.len()];
            let mut widened = [vec![f32::NAN; 7], vec![f32::NAN; 7]];
            let of_rows = tiles_of(&rows);
            let row_words = blocks * B::WORDS;
            on(Stretch {
                words: [&words[of_rows.start * row_words..of_rows.end * row_words], &[]],
                columns,
                first: of_rows.start * LANES,
                rows,
                x: &x[..n * columns],
                widened: &mut widened,
                y: Output::new(&mut y),
                fused: Fused::default(),
                block: PhantomData,
            });
            y
        };
        let check_on = |on: &dyn Fn(Stretch<'_, B>)| {
            for rows in [0..all * LANES, 5..70, 37..41] {
                let alone: Vec<f32> = run(rows.clone(), most, on);
                for (i, got) in alone.iter().enumerate() {
                    let (row, of_x) = (rows.start + i % rows.len(), i / rows.len());
                    let w = &wide[row * columns..(row + 1) * columns];
                    let x = &x[of_x * columns..(of_x + 1) * columns];
                    let terms = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let (sum, size) =
                        terms.fold((0.0, 0.0_f64), |(sum, size), t| (sum + t, size + t.abs()));
                    let error = (f64::from(*got) - sum).abs();
                    assert!(error <= 1e-6 * size.max(1.0), "{format:?}, {rows:?}: {got} for {sum}");
                }
                for n in 1..most {
                    assert_eq!(
                        run(rows.clone(), n, on),
                        alone[..n * rows.len()],
                        "{format:?}, {n}"
                    );
                }
            }
        };
        check_on(&|stretch| Arch::new().dispatch(stretch));
        check_on(&|stretch| stretch.with_simd(pulp::Scalar::new()));
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            check_on(&|stretch| pulp::Simd::vectorize(simd, stretch));
        }
    }

    #[test]
    fn products_are_sums_of_widened_values_on_every_vector_width() {
        for format in FORMATS {
            with_block!(format, B => check::<B>(format));
        }
    }
}
