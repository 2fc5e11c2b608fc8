//! Rows in 4 bits a value. Each group of 32 channels of a row has a scale and an offset of its own, in f16: a value is
//! `scale · code + offset`, codes are 0 to 15.
//!
//! Rows come and go one by one, so that a scale can belong to nothing larger than a row. Some channels of keys are much larger than
//! others, and would take the codes from them: each whole group of a key is rotated before it is coded, by a Walsh–Hadamard matrix,
//! which is its own inverse. `benches/NOTES-cpu.md` compares these choices.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::f16;
use smallvec::SmallVec;

use super::cells::{Cell, F16};
use super::key_store::{SmallBatchDots, TILE};
use crate::Result;
use crate::config::FOUR_BIT_GROUP as GROUP;
use crate::saved_state::SavedState;
use still_compute::Real;
use still_compute::vector::{self, prefetch};

/// Codes that lie together: one channel of the rows of a tile, or 16 channels of a row.
const LINE: usize = TILE;

/// Rows that stay in the first-level cache while every channel of them is summed.
const ROWS: usize = 64;

/// 16 codes, two a byte: code `i` is the low half of byte `i`, code `i + 8` the high half.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Line([u8; LINE / 2]);

impl Line {
    #[inline(always)]
    pub fn wide<T: Real>(self) -> [T; LINE] {
        let mut wide = [T::zero(); LINE];
        for (i, &byte) in self.0.iter().enumerate() {
            wide[i] = T::of_f32(f32::from(byte & 15));
            wide[i + LINE / 2] = T::of_f32(f32::from(byte >> 4));
        }
        wide
    }

    pub fn get(self, index: usize) -> u8 {
        self.0[index % (LINE / 2)] >> (index / (LINE / 2) * 4) & 15
    }

    pub fn set(&mut self, index: usize, code: u8) {
        let (byte, shift) = (&mut self.0[index % (LINE / 2)], index / (LINE / 2) * 4);
        *byte = *byte & !(15 << shift) | code << shift;
    }
}

/// How the values of one group are coded.
pub(super) struct Coding {
    pub scale: f16,
    pub offset: f16,
    inverse: f32,
}

impl Coding {
    /// The group's smallest value has code 0, its largest 15. NaN stays: a group that holds one is not a number.
    pub fn of<T: Real>(group: &[T]) -> Self {
        let pick = |a: f32, b: f32, better: bool| if better || b.is_nan() { b } else { a };
        let (low, high) =
            group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| {
                let x = x.wide() as f32;
                (pick(low, x, x < low), pick(high, x, x > high))
            });
        let (offset, scale) = (f16::from_f32(low), f16::from_f32((high - low) / 15.0));
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        Self { scale, offset, inverse }
    }

    pub fn code<T: Real>(&self, x: T) -> u8 {
        ((x.wide() as f32 - self.offset.to_f32()) * self.inverse).round().clamp(0.0, 15.0) as u8
    }
}

/// Multiplies each whole group of `row` by the Walsh–Hadamard matrix `H_ij = (−1)^popcount(i & j) / √32`.
#[inline(always)]
fn rotate<T: Real>(row: &mut [T]) {
    for group in row.as_chunks_mut::<GROUP>().0 {
        let mut half = 1;
        while half < GROUP {
            for pairs in group.chunks_exact_mut(2 * half) {
                let (a, b) = pairs.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        group.iter_mut().for_each(|x| *x *= T::of_f32(ROTATED));
    }
}

/// `1 / √32`.
const ROTATED: f32 = 0.176_776_69;

/// Rows of one width in tiles of `TILED` rows: 16, each channel of which is a [`Line`], or 1. Tiles of 16 hold keys, which are
/// rotated.
#[derive(Clone, Debug)]
pub(crate) struct FourBit<const TILED: usize> {
    width: usize,
    lines: Vec<Line>,
    /// By tile, group and row of the tile.
    scales: Vec<F16>,
    offsets: Vec<F16>,
}

impl<const TILED: usize> FourBit<TILED> {
    pub fn new(width: usize) -> Self {
        Self { width, lines: Vec::new(), scales: Vec::new(), offsets: Vec::new() }
    }

    /// Groups of a row.
    fn groups(&self) -> usize {
        self.width.div_ceil(GROUP)
    }

    /// Lines of a tile.
    fn lines_a_tile(&self) -> usize {
        if TILED == LINE { self.width } else { self.width.div_ceil(LINE) }
    }

    /// The line of a value, and where in it.
    fn place(&self, row: usize, channel: usize) -> (usize, usize) {
        let first = row / TILED * self.lines_a_tile();
        if TILED == LINE {
            (first + channel, row % LINE)
        } else {
            (first + channel / LINE, channel % LINE)
        }
    }

    /// Where the scale and the offset of a row's group lie.
    fn coding(&self, row: usize, group: usize) -> usize {
        (row / TILED * self.groups() + group) * TILED + row % TILED
    }

    /// Of codes, and of scales and offsets.
    pub fn size_bytes(&self) -> [usize; 2] {
        let scales = size_of_val(self.scales.as_slice()) + size_of_val(self.offsets.as_slice());
        [size_of_val(self.lines.as_slice()), scales]
    }

    /// Room for `rows` rows, zeros where there are new ones. Growth by a fraction keeps the slack small.
    pub fn resize(&mut self, rows: usize) {
        let (tiles, groups) = (rows.div_ceil(TILED), self.groups());
        let lines = tiles * self.lines_a_tile();
        resize(&mut self.lines, lines);
        resize(&mut self.scales, tiles * groups * TILED);
        resize(&mut self.offsets, tiles * groups * TILED);
    }

    /// Overwrites a row.
    pub fn set<T: Real>(&mut self, index: usize, row: &[T]) {
        let mut row: SmallVec<[T; 128]> = row.into();
        if TILED == TILE {
            rotate(&mut row);
        }
        for (group, values) in row.chunks(GROUP).enumerate() {
            let coding = Coding::of(values);
            let at = self.coding(index, group);
            (self.scales[at], self.offsets[at]) = (F16(coding.scale), F16(coding.offset));
            for (i, &x) in values.iter().enumerate() {
                let (line, lane) = self.place(index, group * GROUP + i);
                self.lines[line].set(lane, coding.code(x));
            }
        }
    }

    /// Copies row `from` over row `to`.
    pub fn copy_row(&mut self, from: usize, to: usize) {
        for channel in 0..self.width {
            let ((source, a), (target, b)) = (self.place(from, channel), self.place(to, channel));
            let code = self.lines[source].get(a);
            self.lines[target].set(b, code);
        }
        for group in 0..self.groups() {
            let (source, target) = (self.coding(from, group), self.coding(to, group));
            self.scales[target] = self.scales[source];
            self.offsets[target] = self.offsets[source];
        }
    }

    /// A row, appended to `out`.
    pub fn append_row<T: Real>(&self, index: usize, out: &mut Vec<T>) {
        let start = out.len();
        out.extend((0..self.width).map(|channel| {
            let (line, lane) = self.place(index, channel);
            let at = self.coding(index, channel / GROUP);
            let code = T::of_f32(f32::from(self.lines[line].get(lane)));
            code.mul_add(self.scales[at].widen(), self.offsets[at].widen())
        }));
        if TILED == TILE {
            rotate(&mut out[start..]);
        }
    }

    /// Puts the first `rows` rows among a state's tensors, keys rotated: codes two a byte, channel `2i` in the low half of byte `i`, scales
    /// and offsets by row and group.
    pub fn save(&self, state: &mut SavedState, part: usize, name: &str, rows: usize) -> Result<()> {
        let (cpu, bytes, groups) = (&Device::Cpu, self.width.div_ceil(2), self.groups());
        let code = |row: usize, channel: usize| {
            let (line, lane) = self.place(row, channel);
            if channel < self.width { self.lines[line].get(lane) } else { 0 }
        };
        let pairs = (0..rows).flat_map(|row| (0..bytes).map(move |byte| (row, 2 * byte)));
        let codes = pairs.map(|(row, channel)| code(row, channel) | code(row, channel + 1) << 4);
        state.put(part, name, Tensor::from_iter(codes, cpu)?.reshape((rows, bytes))?);
        for (what, values) in [("scale", &self.scales), ("offset", &self.offsets)] {
            let places =
                (0..rows).flat_map(|row| (0..groups).map(move |group| self.coding(row, group)));
            let values = Tensor::from_iter(places.map(|at| values[at].0), cpu)?;
            state.put(part, &format!("{name}_{what}"), values.reshape((rows, groups))?);
        }
        Ok(())
    }

    /// Takes the rows back, `rows` of them if that is known; how many there are.
    pub fn restore(
        &mut self,
        state: &mut SavedState,
        part: usize,
        name: &str,
        rows: Option<usize>,
    ) -> Result<usize> {
        let (bytes, groups) = (self.width.div_ceil(2), self.groups());
        let codes = state.take(part, name, DType::U8, &[rows, Some(bytes)])?;
        let rows = codes.dim(0)?;
        self.resize(rows);
        let codes = codes.flatten_all()?.to_vec1::<u8>()?;
        for row in 0..rows {
            for channel in 0..self.width {
                let code = codes[row * bytes + channel / 2] >> (channel % 2 * 4) & 15;
                let (line, lane) = self.place(row, channel);
                self.lines[line].set(lane, code);
            }
        }
        for what in ["scale", "offset"] {
            let shape = [Some(rows), Some(groups)];
            let saved = state.take(part, &format!("{name}_{what}"), DType::F16, &shape)?;
            let saved = saved.flatten_all()?.to_vec1::<f16>()?;
            for (i, &x) in saved.iter().enumerate() {
                let at = self.coding(i / groups, i % groups);
                if what == "scale" {
                    self.scales[at] = F16(x);
                } else {
                    self.offsets[at] = F16(x);
                }
            }
        }
        Ok(rows)
    }
}

/// Growth by a fraction keeps the slack small.
pub(super) fn resize<V: Clone + Default>(values: &mut Vec<V>, length: usize) {
    if values.capacity() < length {
        values.reserve_exact((length - values.len()).max(values.len() / 8));
    }
    values.resize(length, V::default());
}

#[inline(always)]
fn widened<T: Real>(values: &[F16]) -> [T; TILE] {
    let mut wide = [T::zero(); TILE];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.widen();
    }
    wide
}

/// Keys.
impl FourBit<TILE> {
    /// The transpose of rows `range`, `[width, rows]`.
    #[inline(always)]
    pub fn transpose<T: Real>(&self, range: Range<usize>, out: &mut [T]) {
        let (count, groups) = (range.len(), self.groups());
        let mut row = range.start;
        while row < range.end {
            // Rows of one tile.
            let (tile, lane, at) = (row / TILE, row % TILE, row - range.start);
            let rows = (TILE - lane).min(range.end - row);
            let lines = &self.lines[tile * self.width..(tile + 1) * self.width];
            for (group, (lines, out)) in
                lines.chunks(GROUP).zip(out.chunks_mut(GROUP * count)).enumerate()
            {
                let from = (tile * groups + group) * TILE;
                let scales: [T; TILE] = widened(&self.scales[from..from + TILE]);
                let offsets: [T; TILE] = widened(&self.offsets[from..from + TILE]);
                for (line, out) in lines.iter().zip(out.chunks_exact_mut(count)) {
                    let codes: [T; TILE] = line.wide();
                    let mut values = [T::zero(); TILE];
                    for i in 0..TILE {
                        values[i] = codes[i].mul_add(scales[i], offsets[i]);
                    }
                    out[at..at + rows].copy_from_slice(&values[lane..lane + rows]);
                }
            }
            row += rows;
        }
        rotate_columns(out, count);
    }
}

/// [`rotate`] of each column of `rows`, `[width, count]`.
#[inline(always)]
fn rotate_columns<T: Real>(rows: &mut [T], count: usize) {
    for group in rows.chunks_exact_mut(GROUP * count) {
        let mut half = 1;
        while half < GROUP {
            for pairs in group.chunks_exact_mut(2 * half * count) {
                let (a, b) = pairs.split_at_mut(half * count);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        group.iter_mut().for_each(|x| *x *= T::of_f32(ROTATED));
    }
}

impl<T: Real> SmallBatchDots<T> for FourBit<TILE> {
    #[inline(always)]
    fn dots<const N: usize>(&self, range: Range<usize>, q: &[T], out: &mut [T], stride: usize) {
        let (width, groups) = (self.width, self.groups());
        let mut rotated: SmallVec<[T; 512]> = q.into();
        rotated.chunks_exact_mut(width).for_each(rotate);
        let q: [&[T]; N] = std::array::from_fn(|n| &rotated[n * width..(n + 1) * width]);
        // What offsets are multiplied by.
        let sums_of_q: SmallVec<[T; 32]> =
            q.iter().flat_map(|q| q.chunks(GROUP).map(vector::sum)).collect();
        for tile in range.start / TILE..range.end.div_ceil(TILE) {
            let lines = &self.lines[tile * width..(tile + 1) * width];
            let mut totals = [[T::zero(); TILE]; N];
            for (group, lines) in lines.chunks(GROUP).enumerate() {
                prefetch(lines);
                // Two sums a query: additions need not wait for each other.
                let mut sums = [[[T::zero(); TILE]; 2]; N];
                let (pairs, rest) = lines.as_chunks::<2>();
                // As long as what is gone through: no index is checked in the loop.
                let q_pairs: [&[[T; 2]]; N] = std::array::from_fn(|n| {
                    &q[n][group * GROUP..].as_chunks::<2>().0[..pairs.len()]
                });
                for (i, pair) in pairs.iter().enumerate() {
                    for chain in 0..2 {
                        let codes: [T; TILE] = pair[chain].wide();
                        for n in 0..N {
                            let x = q_pairs[n][i][chain];
                            for lane in 0..TILE {
                                sums[n][chain][lane] = x.mul_add(codes[lane], sums[n][chain][lane]);
                            }
                        }
                    }
                }
                for line in rest {
                    let codes: [T; TILE] = line.wide();
                    for n in 0..N {
                        let x = q[n][width - 1];
                        for lane in 0..TILE {
                            sums[n][0][lane] = x.mul_add(codes[lane], sums[n][0][lane]);
                        }
                    }
                }
                let from = (tile * groups + group) * TILE;
                let scales: [T; TILE] = widened(&self.scales[from..from + TILE]);
                let offsets: [T; TILE] = widened(&self.offsets[from..from + TILE]);
                for n in 0..N {
                    let sum_of_q = sums_of_q[n * groups + group];
                    for lane in 0..TILE {
                        let product = sums[n][0][lane] + sums[n][1][lane];
                        let total = sum_of_q.mul_add(offsets[lane], totals[n][lane]);
                        totals[n][lane] = product.mul_add(scales[lane], total);
                    }
                }
            }
            let first = (tile * TILE).max(range.start);
            let rows = ((tile + 1) * TILE).min(range.end) - first;
            let lane = first % TILE;
            for n in 0..N {
                out[n * stride + first - range.start..][..rows]
                    .copy_from_slice(&totals[n][lane..lane + rows]);
            }
        }
    }
}

/// Values.
impl FourBit<1> {
    /// Rows `range`, one after the other.
    #[inline(always)]
    pub fn read<T: Real>(&self, range: Range<usize>, out: &mut [T]) {
        let (lines, groups) = (self.lines_a_tile(), self.groups());
        for (row, out) in range.zip(out.chunks_exact_mut(self.width)) {
            for (i, out) in out.chunks_mut(LINE).enumerate() {
                let at = row * groups + i * LINE / GROUP;
                let (scale, offset): (T, T) = (self.scales[at].widen(), self.offsets[at].widen());
                let codes: [T; LINE] = self.lines[row * lines + i].wide();
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = code.mul_add(scale, offset);
                }
            }
        }
    }

    /// Adds to each row of `out`, `[n, width]`, the rows `range` times its weights, rows of `stride` in `weights`.
    pub fn add_weighted<T: Real>(
        &self,
        range: Range<usize>,
        weights: &[T],
        stride: usize,
        out: &mut [T],
    ) {
        let width = self.width;
        T::vectorize_batch(
            #[inline(always)]
            |several| {
                let at_a_time = if several { 4 } else { 1 };
                for (i, out) in out.chunks_mut(at_a_time * width).enumerate() {
                    let (range, weights) = (range.clone(), &weights[at_a_time * i * stride..]);
                    match out.len() / width {
                        4 if several => self.add_small_batch::<T, 4>(range, weights, stride, out),
                        3 if several => self.add_small_batch::<T, 3>(range, weights, stride, out),
                        2 if several => self.add_small_batch::<T, 2>(range, weights, stride, out),
                        _ => self.add_small_batch::<T, 1>(range, weights, stride, out),
                    }
                }
            },
        );
    }

    #[inline(always)]
    fn add_small_batch<T: Real, const N: usize>(
        &self,
        range: Range<usize>,
        weights: &[T],
        stride: usize,
        out: &mut [T],
    ) {
        let (width, lines, groups) = (self.width, self.lines_a_tile(), self.groups());
        let (mut scales, mut offsets) = (Columns::new(groups), Columns::new(groups));
        // By row: what its codes of one group are multiplied by, for each row of `out`.
        let mut factors = [[T::zero(); N]; ROWS];
        for start in range.clone().step_by(ROWS) {
            let rows = start..(start + ROWS).min(range.end);
            let weights: [&[T]; N] =
                std::array::from_fn(|n| &weights[n * stride + start - range.start..][..rows.len()]);
            let coded = rows.start * groups..rows.end * groups;
            scales.take(&self.scales[coded.clone()]);
            offsets.take(&self.offsets[coded]);
            for group in 0..groups {
                let factors = &mut factors[..rows.len()];
                for n in 0..N {
                    let products = weights[n].iter().zip(scales.column(group));
                    let products = products.map(|(&weight, &scale)| weight * scale);
                    factors.iter_mut().zip(products).for_each(|(row, x)| row[n] = x);
                }
                let column = group * GROUP;
                for (out, weights) in out.chunks_exact_mut(width).zip(weights) {
                    let offset = vector::dot(weights, &offsets.column(group)[..rows.len()]);
                    let columns = column..width.min(column + GROUP);
                    out[columns].iter_mut().for_each(|out| *out += offset);
                }
                let (mut line, end) = (column / LINE, lines.min((column + GROUP) / LINE));
                if vector::has_many_registers() && line + 2 <= end {
                    self.add_lines::<T, N, 2>(rows.clone(), factors, line, out);
                    line += 2;
                }
                for line in line..end {
                    self.add_lines::<T, N, 1>(rows.clone(), factors, line, out);
                }
            }
        }
    }

    /// The codes of `LINES` lines from `first` on, times the weights: their sums stay in registers.
    #[inline(always)]
    fn add_lines<T: Real, const N: usize, const LINES: usize>(
        &self,
        rows: Range<usize>,
        factors: &[[T; N]],
        first: usize,
        out: &mut [T],
    ) {
        let (width, lines) = (self.width, self.lines_a_tile());
        assert!(first + LINES <= lines, "no lines to add");
        let mut sums = [[[T::zero(); LINE]; LINES]; N];
        let rows = self.lines[rows.start * lines..rows.end * lines].chunks_exact(lines);
        for (row, factors) in rows.zip(factors) {
            let own = &row[first..first + LINES];
            prefetch(own);
            for (l, line) in own.iter().enumerate() {
                let codes: [T; LINE] = line.wide();
                for n in 0..N {
                    for c in 0..LINE {
                        sums[n][l][c] = factors[n].mul_add(codes[c], sums[n][l][c]);
                    }
                }
            }
        }
        for n in 0..N {
            for l in 0..LINES {
                let column = (first + l) * LINE;
                let columns = LINE.min(width - column);
                let out = &mut out[n * width + column..][..columns];
                out.iter_mut().zip(sums[n][l]).for_each(|(out, sum)| *out += sum);
            }
        }
    }
}

/// What the groups of [`ROWS`] rows are multiplied by or shifted by, widened, group by group.
struct Columns<T> {
    groups: usize,
    wide: SmallVec<[T; 8 * ROWS]>,
    /// `[groups, ROWS]`
    columns: SmallVec<[T; 8 * ROWS]>,
}

impl<T: Real> Columns<T> {
    #[inline(always)]
    fn new(groups: usize) -> Self {
        let values = SmallVec::from_elem(T::zero(), groups * ROWS);
        Self { groups, wide: values.clone(), columns: values }
    }

    /// Takes those of some rows, `[rows, groups]`.
    #[inline(always)]
    fn take(&mut self, values: &[F16]) {
        let wide = &mut self.wide[..values.len()];
        wide.iter_mut().zip(values).for_each(|(wide, value)| *wide = value.widen());
        for (group, column) in self.columns.chunks_exact_mut(ROWS).enumerate() {
            let values = wide.iter().skip(group).step_by(self.groups);
            column.iter_mut().zip(values).for_each(|(to, &value)| *to = value);
        }
    }

    #[inline(always)]
    fn column(&self, group: usize) -> &[T] {
        &self.columns[group * ROWS..(group + 1) * ROWS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(width: usize, seed: usize) -> Vec<f32> {
        (0..width).map(|i| ((i * 7919 + seed) as f32 * 0.618).sin() * 3.0 + 1.0).collect()
    }

    #[test]
    fn a_rotation_is_that_of_its_definition_and_its_own_inverse() {
        let values = row(70, 9);
        let mut rotated = values.clone();
        rotate(&mut rotated);
        for (i, &got) in rotated[GROUP..2 * GROUP].iter().enumerate() {
            let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            let sum: f32 = (0..GROUP).map(|j| sign(j) * values[GROUP + j]).sum();
            assert!((got - sum / 32.0_f32.sqrt()).abs() < 1e-5);
        }
        assert_eq!(rotated[64..], values[64..], "a group that is not whole");
        let mut columns: Vec<f32> = values.iter().flat_map(|&x| [x, 2.0 * x, -x]).collect();
        rotate_columns(&mut columns, 3);
        for (i, &x) in rotated.iter().enumerate() {
            assert_eq!(columns[3 * i..3 * i + 3], [x, 2.0 * x, -x]);
        }
        rotate(&mut rotated);
        rotated.iter().zip(&values).for_each(|(a, b)| assert!((a - b).abs() < 1e-5));
    }

    #[test]
    fn values_are_within_half_a_step() {
        for width in [1, 5, 32, 64, 80] {
            let mut rows = FourBit::<1>::new(width);
            rows.resize(2);
            let values = row(width, 3);
            rows.set(1, &values);
            let mut back: Vec<f32> = Vec::new();
            rows.append_row(1, &mut back);
            for (group, back) in values.chunks(GROUP).zip(back.chunks(GROUP)) {
                let top = group.iter().fold(f32::MIN, |a, &b| a.max(b));
                let low = group.iter().fold(f32::MAX, |a, &b| a.min(b));
                let step = (top - low) / 15.0;
                // Scale and offset are rounded too.
                let bound = 0.5 * step + (top.abs() + low.abs()) * 2e-3;
                for (x, y) in group.iter().zip(back) {
                    assert!((x - y).abs() <= bound, "{x} came back as {y}, step {step}");
                }
            }
        }
    }

    #[test]
    fn what_is_equal_everywhere_is_kept_and_what_is_no_number_stays_none() {
        let mut rows = FourBit::<TILE>::new(40);
        rows.resize(3);
        rows.set(0, &[0.5_f32; 40]);
        rows.set(1, &[0.0_f32; 40]);
        let mut broken = row(40, 1);
        broken[35] = f32::NAN;
        rows.set(2, &broken);
        let back = |index: usize| {
            let mut out: Vec<f32> = Vec::new();
            rows.append_row(index, &mut out);
            out
        };
        assert!(back(0).iter().all(|x| (x - 0.5).abs() < 1e-3), "{:?}", back(0));
        assert_eq!(back(1), [0.0; 40]);
        let third = back(2);
        assert!(third[..GROUP].iter().all(|x| x.is_finite()));
        assert!(third[GROUP..].iter().all(|x| x.is_nan()));
    }

    #[test]
    fn codes_do_not_disturb_their_neighbours() {
        let mut line = Line::default();
        for i in 0..LINE {
            line.set(i, i as u8);
        }
        line.set(3, 9);
        line.set(11, 2);
        let wide: [f32; LINE] = line.wide();
        for i in 0..LINE {
            let expected = [i as u8, 9, 2][usize::from(i == 3) + 2 * usize::from(i == 11)];
            assert_eq!((line.get(i), wide[i]), (expected, f32::from(expected)));
        }
    }
}
