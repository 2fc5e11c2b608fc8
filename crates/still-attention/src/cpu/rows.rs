//! Rows of vectors: borrowed views of tensors, and an owned store of exact rows.

use std::ops::Range;

use super::cells::{Cell, Cells, Values, each};
use super::store::{Coded, Store};
use super::weighted_sum::{Summed, add_weighted};
use still_compute::Real;
use still_compute::matmul::Mat;

/// A borrowed matrix whose rows lie `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
}

impl<'a, T> Rows<'a, T> {
    /// `width` values from the start of every `stride`.
    pub fn new(data: &'a [T], stride: usize, width: usize) -> Self {
        debug_assert!(width <= stride);
        Self { data, stride, width }
    }

    pub fn row(&self, index: usize) -> &'a [T] {
        &self.data[index * self.stride..index * self.stride + self.width]
    }

    /// The rows from `start` on, as a matrix.
    pub fn mat(&self, start: usize) -> Mat<'a, T> {
        Mat::rows(&self.data[start * self.stride..], self.stride)
    }
}

/// Owned rows of one width, one after the other.
pub(crate) type RowStore<T> = Store<T, 1>;

impl<T: Real> RowStore<T> {
    /// Whether [`RowStore::read`] borrows.
    pub fn is_native(&self) -> bool {
        matches!(&self.coded, Coded::Cells(Cells { values: Values::Native(_), .. }))
    }

    /// Rows `range` in the kernel's type: borrowed if stored so, else widened into `scratch`.
    pub fn read<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<T>) -> &'a [T] {
        let span = range.start * self.width..range.end * self.width;
        if let Coded::Cells(Cells { values: Values::Native(v), .. }) = &self.coded {
            return &v[span];
        }
        scratch.resize(span.len(), T::nan());
        let cells = match &self.coded {
            Coded::Cells(cells) => cells,
            Coded::FourBit(codes) => {
                T::vectorize(
                    #[inline(always)]
                    || codes.read(range, scratch),
                );
                return scratch;
            }
            Coded::ByChannel(_) => unreachable!("values are coded by row"),
        };
        each!(&cells.values, v => T::vectorize(
            #[inline(always)]
            || {
                let values = &v[span];
                let Some(scales) = cells.scales() else {
                    scratch.iter_mut().zip(values).for_each(|(to, from)| *to = from.widen());
                    return;
                };
                let values = values.chunks_exact(self.width).zip(&scales[range]);
                for (row, (from, &scale)) in scratch.chunks_exact_mut(self.width).zip(values) {
                    for (to, from) in row.iter_mut().zip(from) {
                        *to = Cell::<T>::widen(*from) * scale;
                    }
                }
            },
        ));
        scratch
    }

    /// Adds to each row of `out`, `[n, width]`, the rows `range` times its weights, rows of `stride` in `weights`.
    #[inline(never)]
    pub fn add_weighted(&self, range: Range<usize>, weights: &[T], stride: usize, out: &mut [T]) {
        let width = self.width;
        match &self.coded {
            Coded::Cells(cells) => each!(&cells.values, v => {
                let summed = Summed { values: v, width, range, scales: cells.scales() };
                add_weighted(summed, weights, stride, out, width);
            }),
            Coded::FourBit(codes) => codes.add_weighted(range, weights, stride, out),
            Coded::ByChannel(_) => unreachable!("values are coded by row"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RowDtype;

    #[test]
    fn weighted_sums_are_those_of_the_rows_given_back() {
        for (dtype, width) in [
            (RowDtype::F32, 80),
            (RowDtype::Bf16, 64),
            (RowDtype::F16, 5),
            (RowDtype::Int8, 96),
            (RowDtype::Int4, 64),
            (RowDtype::Int4, 96),
            (RowDtype::Int4, 37),
        ] {
            let value = |i: usize| ((i * 7919) as f32 * 0.618).sin();
            let mut store = RowStore::<f32>::new(width, dtype);
            store.extend(&(0..150 * width).map(value).collect::<Vec<_>>());
            store.swap_remove(40);
            assert_eq!(store.len(), 149);
            let mut scratch = Vec::new();
            let rows = store.read(0..149, &mut scratch).to_vec();
            let mut last = Vec::new();
            store.append_row(40, &mut last);
            assert_eq!(last, rows[40 * width..41 * width]);
            for (range, n) in [(0..149, 3), (3..3, 2), (70..140, 9), (5..6, 1)] {
                let weights: Vec<f32> = (0..n * 160).map(|i| value(i + 7)).collect();
                let mut out = vec![1.0; n * width];
                store.add_weighted(range.clone(), &weights, 160, &mut out);
                for q in 0..n {
                    for c in 0..width {
                        let sum: f32 = range
                            .clone()
                            .enumerate()
                            .map(|(i, row)| weights[q * 160 + i] * rows[row * width + c])
                            .sum();
                        assert!((out[q * width + c] - 1.0 - sum).abs() < 1e-4, "{dtype:?}");
                    }
                }
            }
        }
    }
}
