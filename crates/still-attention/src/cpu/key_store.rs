//! Keys of one head, stored for products with a small batch of queries: tiles of 16 rows, transposed.
//!
//! A query's logits against a tile are then one vector register, and none is summed across.

use std::ops::Range;

use super::cells::{Bf16, Cell, Cells, Values, each};
use super::channel_codes::ChannelCodes;
use super::store::{Coded, Store};
use smallvec::SmallVec;
use still_compute::Real;
use still_compute::vector::prefetch;

/// Rows of a tile.
pub(crate) const TILE: usize = 16;

/// Keys of one head.
pub(crate) type KeyStore<T> = Store<T, TILE>;

impl<T: Real> KeyStore<T> {
    /// An empty store of 4-bit keys of a head that keeps every token: they come 32 at a time.
    pub fn by_channel(width: usize) -> Self {
        Self::of(width, Coded::ByChannel(ChannelCodes::new(width)))
    }

    /// The transpose of rows `range`, `[width, rows]`, in `scratch`.
    pub fn transposed<'a>(&self, range: Range<usize>, scratch: &'a mut Vec<T>) -> &'a [T] {
        scratch.resize(self.width * range.len(), T::nan());
        if range.is_empty() {
            return scratch;
        }
        match &self.coded {
            Coded::Cells(cells) => each!(&cells.values, v => T::vectorize(
                #[inline(always)]
                || self.transpose(v, cells.scales(), range.clone(), scratch),
            )),
            Coded::FourBit(codes) => T::vectorize(
                #[inline(always)]
                || codes.transpose(range.clone(), scratch),
            ),
            Coded::ByChannel(codes) => T::vectorize(
                #[inline(always)]
                || codes.transpose(range.clone(), scratch),
            ),
        }
        if let Some(scaling) = &self.scaling {
            let lines = scratch.chunks_exact_mut(range.len()).zip(&scaling.widening);
            lines.for_each(|(line, &by)| line.iter_mut().for_each(|x| *x *= by));
        }
        scratch
    }

    #[inline(always)]
    fn transpose<C: Cell<T>>(
        &self,
        values: &[C],
        scales: Option<&[T]>,
        range: Range<usize>,
        out: &mut [T],
    ) {
        let count = range.len();
        let mut row = range.start;
        while row < range.end {
            // Rows of one tile.
            let (lane, at) = (row % TILE, row - range.start);
            let rows = (TILE - lane).min(range.end - row);
            let tile = &values[row / TILE * TILE * self.width..];
            let lines = tile.as_chunks::<TILE>().0.iter();
            for (line, out) in lines.zip(out.chunks_exact_mut(count)) {
                let out = &mut out[at..at + rows];
                if let Ok(out) = <&mut [T; TILE]>::try_from(&mut *out) {
                    for (to, from) in out.iter_mut().zip(line) {
                        *to = from.widen();
                    }
                } else {
                    for (to, from) in out.iter_mut().zip(&line[lane..]) {
                        *to = from.widen();
                    }
                }
            }
            row += rows;
        }
        if let Some(scales) = scales {
            let scales = &scales[range];
            for out in out.chunks_exact_mut(count) {
                out.iter_mut().zip(scales).for_each(|(x, &scale)| *x *= scale);
            }
        }
    }

    /// Whether keys are bf16.
    pub fn is_bf16(&self) -> bool {
        matches!(&self.coded, Coded::Cells(Cells { values: Values::Bf16(_), .. }))
    }

    /// Whether there are [`panels`](Self::panels): of keys that are coded value by value, in a kernel of f32.
    pub fn has_panels(&self) -> bool {
        matches!(self.coded, Coded::Cells(_)) && T::as_f32s(&[]).is_some()
    }

    /// Where the values of the tiles of some rows lie, and how many tiles that is.
    fn tiles_of(&self, rows: &Range<usize>) -> (Range<usize>, usize) {
        debug_assert!(rows.start.is_multiple_of(TILE), "rows {rows:?} begin within a tile");
        let tiles = rows.start / TILE..rows.end.div_ceil(TILE);
        let tile = TILE * self.width;
        (tiles.start * tile..tiles.end * tile, tiles.len())
    }

    /// The tiles of rows `rows`, the first of which begins a tile, in f32, in `scratch` unless keys are stored so: line `i` of each has
    /// channel `i` of its rows.
    ///
    /// # Panics
    /// If there are none.
    pub fn panels<'a>(&'a self, rows: Range<usize>, scratch: &'a mut Vec<T>) -> &'a [[f32; TILE]] {
        let Coded::Cells(cells) = &self.coded else { panic!("keys of four bits have no panels") };
        let (places, _) = self.tiles_of(&rows);
        let values = match &cells.values {
            Values::Native(values) => &values[places],
            values => {
                scratch.resize(places.len(), T::nan());
                let scales = cells.scales().map(|scales| &scales[rows.start..]);
                each!(values, v => T::vectorize(
                    #[inline(always)]
                    || widen_tiles(&v[places], scales, self.width, scratch),
                ));
                if let Some(scaling) = &self.scaling {
                    let lines = scratch.as_chunks_mut::<TILE>().0.iter_mut();
                    lines.zip(scaling.widening.iter().cycle()).for_each(|(line, &by)| {
                        line.iter_mut().for_each(|x| *x *= by);
                    });
                }
                &*scratch
            }
        };
        T::as_f32s(values).expect("panels are f32").as_chunks().0
    }

    /// The tiles of rows `rows`, the first of which begins a tile, with channels in pairs, in `scratch`: line `i` of a tile has channels
    /// `2i` (low half) and `2i + 1` of its rows. Absent unless keys are bf16.
    pub fn paired<'a>(
        &self,
        rows: Range<usize>,
        scratch: &'a mut Vec<[u32; TILE]>,
    ) -> Option<&'a [[u32; TILE]]> {
        let Coded::Cells(Cells { values: Values::Bf16(values), .. }) = &self.coded else {
            return None;
        };
        let (places, tiles) = self.tiles_of(&rows);
        let lines = self.width.div_ceil(2);
        scratch.resize(tiles * lines, [0; TILE]);
        T::vectorize(
            #[inline(always)]
            || {
                let tiles = values[places].chunks_exact(TILE * self.width);
                let none = [Bf16::default(); TILE];
                for (to, tile) in scratch.chunks_exact_mut(lines).zip(tiles) {
                    let channels = tile.as_chunks::<TILE>().0;
                    for (to, pair) in to.iter_mut().zip(channels.chunks(2)) {
                        let odd = pair.get(1).unwrap_or(&none);
                        for lane in 0..TILE {
                            let (low, high) = (pair[0][lane].to_bits(), odd[lane].to_bits());
                            to[lane] = u32::from(high) << 16 | u32::from(low);
                        }
                    }
                }
            },
        );
        Some(scratch)
    }

    /// Products of a small batch of queries with rows `range`: `q` `[n, width]`, into the first values of each row of
    /// `out`, rows of `stride`.
    #[inline(never)]
    pub fn dots(&self, range: Range<usize>, q: &[T], out: &mut [T], stride: usize) {
        if range.is_empty() {
            return;
        }
        let width = self.width;
        let mut scaled: SmallVec<[T; 512]> = SmallVec::new();
        let q = match &self.scaling {
            None => q,
            Some(scaling) => {
                scaled.extend_from_slice(q);
                scaling.widen(&mut scaled);
                &scaled
            }
        };
        match &self.coded {
            Coded::Cells(cells) => each!(&cells.values, v => {
                let keys = Tiled { values: v, width, scales: cells.scales() };
                in_fours(&keys, width, range, q, out, stride);
            }),
            Coded::FourBit(codes) => in_fours(codes, width, range, q, out, stride),
            Coded::ByChannel(codes) => in_fours(codes, width, range, q, out, stride),
        }
    }
}

/// Widens tiles, as many as `to` has; `scales` begins with that of their first row.
#[inline(always)]
fn widen_tiles<T: Real, C: Cell<T>>(
    values: &[C],
    scales: Option<&[T]>,
    width: usize,
    to: &mut [T],
) {
    let tiles = to.chunks_exact_mut(TILE * width).zip(values.chunks_exact(TILE * width));
    for (tile, (to, values)) in tiles.enumerate() {
        let lines = to.as_chunks_mut::<TILE>().0.iter_mut().zip(values.as_chunks::<TILE>().0);
        match scales {
            Some(scales) => {
                let scales = scales[tile * TILE..].first_chunk::<TILE>().expect("a scale a row");
                for (to, line) in lines {
                    let wide = widened(line);
                    for lane in 0..TILE {
                        to[lane] = wide[lane] * scales[lane];
                    }
                }
            }
            None => lines.for_each(|(to, line)| *to = widened(line)),
        }
    }
}

/// Tiled keys that a small batch of queries is multiplied with.
pub(super) trait SmallBatchDots<T> {
    /// Products of the queries `q` `[N, width]` with rows `range`, into the first values of each row of `out`, rows of `stride`.
    fn dots<const N: usize>(&self, range: Range<usize>, q: &[T], out: &mut [T], stride: usize);
}

/// Up to four queries at a time.
fn in_fours<T: Real>(
    keys: &impl SmallBatchDots<T>,
    width: usize,
    range: Range<usize>,
    q: &[T],
    out: &mut [T],
    stride: usize,
) {
    T::vectorize_batch(
        #[inline(always)]
        |several| {
            let at_a_time = if several { 4 } else { 1 };
            for (i, q) in q.chunks(at_a_time * width).enumerate() {
                let (range, out) = (range.clone(), &mut out[at_a_time * i * stride..]);
                match q.len() / width {
                    4 if several => keys.dots::<4>(range, q, out, stride),
                    3 if several => keys.dots::<3>(range, q, out, stride),
                    2 if several => keys.dots::<2>(range, q, out, stride),
                    _ => keys.dots::<1>(range, q, out, stride),
                }
            }
        },
    );
}

/// Keys whose values are coded one by one.
struct Tiled<'a, T, C> {
    values: &'a [C],
    width: usize,
    /// By row, if rows are scaled.
    scales: Option<&'a [T]>,
}

impl<T: Real, C: Cell<T>> SmallBatchDots<T> for Tiled<'_, T, C> {
    #[inline(always)]
    fn dots<const N: usize>(&self, range: Range<usize>, q: &[T], out: &mut [T], stride: usize) {
        let Self { values, width, scales } = *self;
        let q: [&[T]; N] = std::array::from_fn(|n| &q[n * width..(n + 1) * width]);
        for tile in range.start / TILE..range.end.div_ceil(TILE) {
            let lines =
                values[tile * TILE * width..(tile + 1) * TILE * width].as_chunks::<TILE>().0;
            // Two sums a query: additions need not wait for each other.
            let mut sums = [[[T::zero(); TILE]; 2]; N];
            let (pairs, rest) = lines.as_chunks::<2>();
            // As long as what is gone through: no index is checked in the loop.
            let q_pairs: [&[[T; 2]]; N] =
                std::array::from_fn(|n| &q[n].as_chunks::<2>().0[..pairs.len()]);
            for (i, pair) in pairs.iter().enumerate() {
                prefetch(pair);
                for chain in 0..2 {
                    let line = widened(&pair[chain]);
                    for n in 0..N {
                        let x = q_pairs[n][i][chain];
                        for lane in 0..TILE {
                            sums[n][chain][lane] = x.mul_add(line[lane], sums[n][chain][lane]);
                        }
                    }
                }
            }
            for line in rest {
                let line = widened(line);
                for n in 0..N {
                    let x = q[n][width - 1];
                    for lane in 0..TILE {
                        sums[n][0][lane] = x.mul_add(line[lane], sums[n][0][lane]);
                    }
                }
            }
            let first = (tile * TILE).max(range.start);
            let rows = ((tile + 1) * TILE).min(range.end) - first;
            let lane = first % TILE;
            for n in 0..N {
                let mut total = [T::zero(); TILE];
                for lane in 0..TILE {
                    total[lane] = sums[n][0][lane] + sums[n][1][lane];
                }
                let out = &mut out[n * stride + first - range.start..][..rows];
                match scales {
                    Some(scales) => {
                        let products = total[lane..].iter().zip(&scales[first..]);
                        out.iter_mut().zip(products).for_each(|(to, (&x, &scale))| *to = x * scale);
                    }
                    None => out.copy_from_slice(&total[lane..lane + rows]),
                }
            }
        }
    }
}

#[inline(always)]
fn widened<T: Real, C: Cell<T>>(line: &[C; TILE]) -> [T; TILE] {
    let mut wide = [T::zero(); TILE];
    for (wide, value) in wide.iter_mut().zip(line) {
        *wide = value.widen();
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RowDtype;
    use crate::key_exponents::KeyExponents;

    fn rows(count: usize, width: usize, seed: usize) -> Vec<f32> {
        (0..count * width).map(|i| ((i * 7919 + seed) as f32 * 0.618).sin()).collect()
    }

    #[test]
    fn rows_come_back_whole_transposed_and_multiplied() {
        for width in [1, 5, 64] {
            let values = rows(53, width, 1);
            let mut store = KeyStore::new(width, RowDtype::F32);
            store.extend(&values);
            store.set(20, &values[..width]);
            store.swap_remove(3);
            store.swap_remove(store.len() - 1);
            let mut expected: Vec<Vec<f32>> =
                values.chunks_exact(width).map(<[f32]>::to_vec).collect();
            expected[20] = values[..width].to_vec();
            expected.swap_remove(3);
            expected.pop();
            assert_eq!(store.len(), 51);
            let mut row = Vec::new();
            store.append_row(20, &mut row);
            assert_eq!(row, expected[20]);
            for range in [0..51, 0..0, 7..9, 5..40, 16..32, 50..51] {
                let mut scratch = Vec::new();
                let count = range.len();
                let transposed = store.transposed(range.clone(), &mut scratch);
                for (i, row) in range.clone().enumerate() {
                    let column: Vec<f32> = (0..width).map(|c| transposed[c * count + i]).collect();
                    assert_eq!(column, expected[row]);
                }
                for queries in 1..=9 {
                    let q = rows(queries, width, 2);
                    let stride = count + 3;
                    let mut out = vec![f32::NAN; queries * stride];
                    store.dots(range.clone(), &q, &mut out, stride);
                    for (n, q) in q.chunks_exact(width).enumerate() {
                        for (i, row) in range.clone().enumerate() {
                            let dot: f32 = q.iter().zip(&expected[row]).map(|(a, b)| a * b).sum();
                            assert!((out[n * stride + i] - dot).abs() < 1e-5);
                        }
                        assert!(
                            out[n * stride + count..(n + 1) * stride].iter().all(|x| x.is_nan())
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn channels_are_paired_in_bf16_only() {
        for (width, count) in [(64, 37), (5, 16), (80, 1), (7, 0)] {
            let mut store = KeyStore::new(width, RowDtype::Bf16);
            store.extend(&rows(count, width, 9));
            let mut scratch = vec![[7; TILE]; 3];
            let paired = store.paired(0..count, &mut scratch).unwrap().to_vec();
            let lines = width.div_ceil(2);
            assert_eq!(paired.len(), count.div_ceil(TILE) * lines);
            if count > TILE {
                let later = store.paired(TILE..count, &mut scratch).unwrap();
                assert_eq!(later, &paired[lines..]);
            }
            for row in 0..count {
                let mut values: Vec<f32> = Vec::new();
                store.append_row(row, &mut values);
                values.resize(2 * lines, 0.0);
                for (i, pair) in values.chunks(2).enumerate() {
                    let bits = paired[row / TILE * lines + i][row % TILE];
                    assert_eq!(f32::from_bits(bits << 16), pair[0]);
                    assert_eq!(f32::from_bits(bits & 0xffff_0000), pair[1]);
                }
            }
        }
        assert!(KeyStore::<f32>::new(4, RowDtype::F16).paired(0..0, &mut Vec::new()).is_none());
    }

    #[test]
    fn every_dtype_multiplies_what_it_gives_back() {
        let exponents = KeyExponents::new((0..64).map(|c| [0, 3, -2][c % 3]).collect()).unwrap();
        for (dtype, exponents) in
            RowDtype::ALL.into_iter().flat_map(|dtype| [(dtype, None), (dtype, Some(&exponents))])
        {
            let mut store = KeyStore::new(64, dtype).scaled(exponents);
            // Channels as large as the exponents say, and queries that see as much of each.
            let (mut k, mut q) = (rows(37, 64, 3), rows(3, 64, 4));
            for (x, sign) in [(&mut k, 1), (&mut q, -1)] {
                let powers = exponents.map(|exponents| exponents.powers::<f32>(sign));
                let powers = powers.iter().flatten().cycle();
                x.iter_mut().zip(powers).for_each(|(x, power)| *x *= power);
            }
            store.extend(&k);
            let mut out = vec![0.0; 3 * 37];
            store.dots(0..37, &q, &mut out, 37);
            let mut scratch = Vec::new();
            let transposed = store.transposed(0..37, &mut scratch);
            let mut wide = Vec::new();
            let panels = store.has_panels().then(|| store.panels(0..37, &mut wide).to_vec());
            if let Some(panels) = &panels {
                let later = store.panels(TILE..37, &mut wide);
                assert_eq!(later, &panels[64..], "{dtype:?}");
            }
            for row in 0..37 {
                let mut values = Vec::new();
                store.append_row(row, &mut values);
                for (c, &value) in values.iter().enumerate() {
                    assert_eq!(transposed[c * 37 + row], value, "{dtype:?}");
                    if let Some(panels) = &panels {
                        assert_eq!(panels[row / TILE * 64 + c][row % TILE], value, "{dtype:?}");
                    }
                }
                for n in 0..3 {
                    let q = &q[n * 64..(n + 1) * 64];
                    let dot: f32 = q.iter().zip(&values).map(|(a, b)| a * b).sum();
                    assert!((out[n * 37 + row] - dot).abs() < 2e-5, "{dtype:?}");
                }
            }
        }
    }

    /// A channel a thousand times larger takes no codes from the others.
    #[test]
    fn scaled_channels_keep_their_codes() {
        let exponents = KeyExponents::new((0..64).map(|c| [0, 10][c / 63]).collect()).unwrap();
        for dtype in [RowDtype::Int8, RowDtype::Int4] {
            let mut row = rows(1, 64, 3);
            let plain = back(&row, dtype, None);
            row[63] *= 1024.0;
            let scaled = back(&row, dtype, Some(&exponents));
            assert_eq!(scaled[..63], plain[..63], "{dtype}");
            assert_eq!(scaled[63], 1024.0 * plain[63], "{dtype}");
            let unscaled = back(&row, dtype, None);
            assert!(unscaled[..63].iter().zip(&plain).any(|(a, b)| (a - b).abs() > 0.5), "{dtype}");
        }
    }

    fn back(row: &[f32], dtype: RowDtype, exponents: Option<&KeyExponents>) -> Vec<f32> {
        let mut store = KeyStore::new(row.len(), dtype).scaled(exponents);
        store.push(row);
        let mut back = Vec::new();
        store.append_row(0, &mut back);
        back
    }

    #[test]
    fn four_bit_keys_of_any_width_multiply_what_they_give_back() {
        for width in [1, 5, 40, 80, 128] {
            let mut store = KeyStore::new(width, RowDtype::Int4);
            store.extend(&rows(53, width, 5));
            store.swap_remove(7);
            store.swap_remove(0);
            check_ranges(&store, [0..51, 0..0, 7..9, 5..40, 16..32, 50..51]);
        }
    }

    #[test]
    fn keys_by_channel_multiply_what_they_give_back() {
        let exponents = KeyExponents::new((0..64).map(|c| [0, 3, -2][c % 3]).collect()).unwrap();
        for (width, exponents) in [(32, None), (64, Some(&exponents)), (128, None)] {
            let mut store = KeyStore::by_channel(width).scaled(exponents);
            let keys = rows(160, width, 5);
            store.extend(&keys[..64 * width]);
            store.extend(&keys[64 * width..]);
            check_ranges(&store, [0..160, 0..0, 7..9, 5..90, 32..64, 150..151]);
            store.truncate(96);
            assert_eq!(store.len(), 96);
            // As many bytes as rows in 4 bits take, and as close as 15 steps of each channel are.
            let mut by_row = KeyStore::new(width, RowDtype::Int4);
            by_row.extend(&keys[..96 * width]);
            assert_eq!(store.size_bytes(), by_row.size_bytes());
            for (row, key) in keys[..96 * width].chunks(width).enumerate() {
                let mut back = Vec::new();
                store.append_row(row, &mut back);
                for (got, x) in back.iter().zip(key) {
                    assert!((got - x).abs() < 0.501 * 2.0 / 15.0 + 1e-3, "{got} of {x}");
                }
            }
        }
    }

    /// Products and transposes of ranges of a store are those of the rows that it gives back.
    fn check_ranges<const N: usize>(store: &KeyStore<f32>, ranges: [Range<usize>; N]) {
        let width = store.width();
        for range in ranges {
            let count = range.len();
            let mut scratch = Vec::new();
            let transposed = store.transposed(range.clone(), &mut scratch).to_vec();
            for queries in 1..=9 {
                let (q, stride) = (rows(queries, width, 6), count + 3);
                let mut out = vec![f32::NAN; queries * stride];
                store.dots(range.clone(), &q, &mut out, stride);
                for (n, q) in q.chunks_exact(width).enumerate() {
                    for (i, row) in range.clone().enumerate() {
                        let mut values: Vec<f32> = Vec::new();
                        store.append_row(row, &mut values);
                        let dot: f32 = q.iter().zip(&values).map(|(a, b)| a * b).sum();
                        assert!((out[n * stride + i] - dot).abs() < 5e-5, "{width}");
                        for (c, &value) in values.iter().enumerate() {
                            assert_eq!(transposed[c * count + i], value);
                        }
                    }
                    let padding = &out[n * stride + count..(n + 1) * stride];
                    assert!(padding.iter().all(|x| x.is_nan()));
                }
            }
        }
    }
}
