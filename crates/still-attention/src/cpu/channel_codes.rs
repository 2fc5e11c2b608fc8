//! Keys of a head that keeps every token, in 4 bits a value. Each channel of 32 keys has a scale and an offset of its own, in f16: a
//! value is `scale · code + offset`, codes are 0 to 15.
//!
//! Channels of keys differ more from each other than from token to token: in Qwen2.5-Coder's whole heads this leaves a third of the error
//! in logits that a scale for 32 channels of a rotated key leaves, in the same bytes. It takes keys that come and stay 32 at a time: heads
//! that keep some tokens of a chunk have [`FourBit`](super::four_bit::FourBit). The coding is KIVI's of keys (arXiv 2402.02750).

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::f16;
use smallvec::SmallVec;

use super::cells::{Cell, F16};
use super::four_bit::{Coding, Line, resize};
use super::key_store::{SmallBatchDots, TILE};
use crate::Result;
use crate::config::FOUR_BIT_GROUP as GROUP;
use crate::saved_state::SavedState;
use still_compute::Real;
use still_compute::vector::prefetch;

/// Tiles whose keys share scales.
const TILES: usize = GROUP / TILE;

/// Keys of one width, in groups of 32.
#[derive(Clone, Debug)]
pub(crate) struct ChannelCodes {
    width: usize,
    /// By tile and channel: a code of each key of the tile.
    lines: Vec<Line>,
    /// By group and channel.
    scales: Vec<F16>,
    offsets: Vec<F16>,
}

impl ChannelCodes {
    pub fn new(width: usize) -> Self {
        Self { width, lines: Vec::new(), scales: Vec::new(), offsets: Vec::new() }
    }

    /// Of codes, and of scales and offsets.
    pub fn size_bytes(&self) -> [usize; 2] {
        let scales = size_of_val(self.scales.as_slice()) + size_of_val(self.offsets.as_slice());
        [size_of_val(self.lines.as_slice()), scales]
    }

    /// Room for `rows` keys, zeros where there are new ones.
    pub fn resize(&mut self, rows: usize) {
        let groups = rows.div_ceil(GROUP);
        resize(&mut self.lines, groups * TILES * self.width);
        resize(&mut self.scales, groups * self.width);
        resize(&mut self.offsets, groups * self.width);
    }

    /// Writes whole groups of keys behind the first `held`, channels multiplied by `narrowing` first. There is room for them.
    ///
    /// # Panics
    /// If keys are not a whole number of groups.
    pub fn write<T: Real>(&mut self, held: usize, keys: &[T], narrowing: Option<&[T]>) {
        let width = self.width;
        assert!(held.is_multiple_of(GROUP) && keys.len().is_multiple_of(GROUP * width));
        for (i, keys) in keys.chunks_exact(GROUP * width).enumerate() {
            let group = held / GROUP + i;
            for channel in 0..width {
                let by = narrowing.map_or_else(T::one, |by| by[channel]);
                let values: [T; GROUP] =
                    std::array::from_fn(|row| keys[row * width + channel] * by);
                let coding = Coding::of(&values);
                let at = group * width + channel;
                (self.scales[at], self.offsets[at]) = (F16(coding.scale), F16(coding.offset));
                for (row, &x) in values.iter().enumerate() {
                    let line = self.line(group * GROUP + row, channel);
                    self.lines[line].set(row % TILE, coding.code(x));
                }
            }
        }
    }

    fn line(&self, row: usize, channel: usize) -> usize {
        row / TILE * self.width + channel
    }

    /// A key, appended to `out`.
    pub fn append_row<T: Real>(&self, row: usize, out: &mut Vec<T>) {
        out.extend((0..self.width).map(|channel| {
            let at = row / GROUP * self.width + channel;
            let code = T::of_f32(f32::from(self.code(row, channel)));
            code.mul_add(self.scales[at].widen(), self.offsets[at].widen())
        }));
    }

    fn code(&self, row: usize, channel: usize) -> u8 {
        self.lines[self.line(row, channel)].get(row % TILE)
    }

    /// The transpose of keys `range`, `[width, rows]`.
    #[inline(always)]
    pub fn transpose<T: Real>(&self, range: Range<usize>, out: &mut [T]) {
        let (count, width) = (range.len(), self.width);
        let mut row = range.start;
        while row < range.end {
            // Keys of one tile.
            let (tile, lane, at) = (row / TILE, row % TILE, row - range.start);
            let rows = (TILE - lane).min(range.end - row);
            let codings = tile / TILES * width..(tile / TILES + 1) * width;
            let codings = self.scales[codings.clone()].iter().zip(&self.offsets[codings]);
            let lines = self.lines[tile * width..(tile + 1) * width].iter().zip(codings);
            for ((line, (scale, offset)), out) in lines.zip(out.chunks_exact_mut(count)) {
                let (scale, offset): (T, T) = (scale.widen(), offset.widen());
                let mut values: [T; TILE] = line.wide();
                values.iter_mut().for_each(|x| *x = x.mul_add(scale, offset));
                out[at..at + rows].copy_from_slice(&values[lane..lane + rows]);
            }
            row += rows;
        }
    }

    /// Puts the first `rows` keys among a state's tensors: codes by group and channel, two a byte, key `2i` in the low half of byte `i`;
    /// scales and offsets by group and channel.
    pub fn save(&self, state: &mut SavedState, part: usize, name: &str, rows: usize) -> Result<()> {
        let (cpu, width, groups) = (&Device::Cpu, self.width, rows / GROUP);
        let places = (0..groups).flat_map(|group| (0..width).map(move |channel| (group, channel)));
        let codes = places.flat_map(|(group, channel)| {
            let code = move |i: usize| self.code(group * GROUP + i, channel);
            (0..GROUP / 2).map(move |i| code(2 * i) | code(2 * i + 1) << 4)
        });
        state.put(part, name, Tensor::from_iter(codes, cpu)?.reshape((rows, width / 2))?);
        for (what, values) in [(CHANNEL_SCALE, &self.scales), (CHANNEL_OFFSET, &self.offsets)] {
            let values = values[..groups * width].iter().map(|x| x.0);
            let values = Tensor::from_iter(values, cpu)?.reshape((groups, width))?;
            state.put(part, &format!("{name}_{what}"), values);
        }
        Ok(())
    }

    /// Takes the keys back, `rows` of them if that is known; how many there are.
    pub fn restore(
        &mut self,
        state: &mut SavedState,
        part: usize,
        name: &str,
        rows: Option<usize>,
    ) -> Result<usize> {
        let width = self.width;
        let codes = state.take(part, name, DType::U8, &[rows, Some(width / 2)])?;
        let rows = codes.dim(0)?;
        let shape = [Some(rows.div_ceil(GROUP)), Some(width)];
        self.resize(rows);
        for (what, to) in [(CHANNEL_SCALE, &mut self.scales), (CHANNEL_OFFSET, &mut self.offsets)] {
            let saved = state.take(part, &format!("{name}_{what}"), DType::F16, &shape)?;
            let saved = saved.flatten_all()?.to_vec1::<f16>()?;
            to.iter_mut().zip(saved).for_each(|(to, x)| *to = F16(x));
        }
        let codes = codes.flatten_all()?.to_vec1::<u8>()?;
        for (i, pair) in codes.into_iter().enumerate() {
            let (place, pairs) = (i / (GROUP / 2), i % (GROUP / 2));
            let (group, channel) = (place / width, place % width);
            for (half, code) in [pair & 15, pair >> 4].into_iter().enumerate() {
                let row = group * GROUP + 2 * pairs + half;
                let line = self.line(row, channel);
                self.lines[line].set(row % TILE, code);
            }
        }
        Ok(rows)
    }
}

/// Names of what a saved state has of them.
pub(crate) const CHANNEL_SCALE: &str = "channel_scale";
pub(crate) const CHANNEL_OFFSET: &str = "channel_offset";

impl<T: Real> SmallBatchDots<T> for ChannelCodes {
    /// `q · k = Σ (q_c scale_c) code_c + Σ q_c offset_c`: a group's scales go to the queries, once for its keys.
    #[inline(always)]
    fn dots<const N: usize>(&self, range: Range<usize>, q: &[T], out: &mut [T], stride: usize) {
        let width = self.width;
        let mut scaled: SmallVec<[T; 512]> = SmallVec::from_elem(T::zero(), N * width);
        let mut offsets = [T::zero(); N];
        let mut scaled_for = usize::MAX;
        for tile in range.start / TILE..range.end.div_ceil(TILE) {
            if tile / TILES != scaled_for {
                scaled_for = tile / TILES;
                self.scale_queries(scaled_for, q, &mut scaled, &mut offsets);
            }
            let lines = &self.lines[tile * width..(tile + 1) * width];
            prefetch(lines);
            let scaled: [&[T]; N] = std::array::from_fn(|n| &scaled[n * width..(n + 1) * width]);
            // Two sums a query: additions need not wait for each other. Widths are whole groups, so lines come in pairs.
            let mut sums = [[[T::zero(); TILE]; 2]; N];
            let pairs = lines.as_chunks::<2>().0;
            let q_pairs: [&[[T; 2]]; N] =
                std::array::from_fn(|n| &scaled[n].as_chunks::<2>().0[..pairs.len()]);
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
            let first = (tile * TILE).max(range.start);
            let rows = ((tile + 1) * TILE).min(range.end) - first;
            let lane = first % TILE;
            for n in 0..N {
                let mut totals = [T::zero(); TILE];
                for (total, (a, b)) in totals.iter_mut().zip(sums[n][0].iter().zip(&sums[n][1])) {
                    *total = *a + *b + offsets[n];
                }
                out[n * stride + first - range.start..][..rows]
                    .copy_from_slice(&totals[lane..lane + rows]);
            }
        }
    }
}

impl ChannelCodes {
    /// The queries `q` `[n, width]` times the scales of a group, and their products with its offsets.
    #[inline(always)]
    fn scale_queries<T: Real>(&self, group: usize, q: &[T], scaled: &mut [T], offsets: &mut [T]) {
        let width = self.width;
        let codings = group * width..(group + 1) * width;
        let (scales, of_group) = (&self.scales[codings.clone()], &self.offsets[codings]);
        let queries = q.chunks_exact(width).zip(scaled.chunks_exact_mut(width));
        for ((q, scaled), sum) in queries.zip(offsets) {
            let mut sums = [T::zero(); TILE];
            let (q, scaled) = (q.as_chunks::<TILE>().0, scaled.as_chunks_mut::<TILE>().0);
            let codings = scales.as_chunks::<TILE>().0.iter().zip(of_group.as_chunks::<TILE>().0);
            for ((q, scaled), (scales, of_group)) in q.iter().zip(scaled).zip(codings) {
                for i in 0..TILE {
                    scaled[i] = q[i] * scales[i].widen();
                    sums[i] = q[i].mul_add(of_group[i].widen(), sums[i]);
                }
            }
            *sum = sums.iter().fold(T::zero(), |a, &b| a + b);
        }
    }
}
