//! Rows of vectors: borrowed views of tensors, and owned stores of exact K/V rows.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::linalg::Mat;
use crate::config::RowDtype;
use crate::real::Real;
use crate::vector::vectorize;

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

/// Owned rows of one width, stored in the dtype that the state declares.
#[derive(Clone, Debug)]
pub(crate) struct RowStore<T> {
    width: usize,
    values: Values<T>,
}

#[derive(Clone, Debug)]
enum Values<T> {
    Native(Vec<T>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

/// Runs one body on whichever vector is inside.
macro_rules! each {
    ($values:expr, $v:ident => $body:expr) => {
        match $values {
            Values::Native($v) => $body,
            Values::Bf16($v) => $body,
            Values::F16($v) => $body,
        }
    };
}

impl<T: Real> RowStore<T> {
    /// An empty store; `RowDtype::F32` keeps the kernel's own type.
    pub fn new(width: usize, dtype: RowDtype) -> Self {
        let values = match dtype {
            RowDtype::F32 => Values::Native(Vec::new()),
            RowDtype::Bf16 => Values::Bf16(Vec::new()),
            RowDtype::F16 => Values::F16(Vec::new()),
        };
        Self { width, values }
    }

    /// A store of `rows` zero rows.
    pub fn zeros(width: usize, rows: usize, dtype: RowDtype) -> Self {
        let mut store = Self::new(width, dtype);
        each!(&mut store.values, v => v.resize(rows * width, Default::default()));
        store
    }

    pub fn len(&self) -> usize {
        each!(&self.values, v => v.len()) / self.width
    }

    pub fn size_bytes(&self) -> usize {
        each!(&self.values, v => std::mem::size_of_val(v.as_slice()))
    }

    /// Overwrites row `index`.
    pub fn set(&mut self, index: usize, row: &[T]) {
        debug_assert_eq!(row.len(), self.width);
        let span = index * self.width..(index + 1) * self.width;
        match &mut self.values {
            Values::Native(v) => v[span].copy_from_slice(row),
            Values::Bf16(v) => {
                for (to, from) in v[span].iter_mut().zip(row) {
                    *to = bf16::from_f64(from.wide());
                }
            }
            Values::F16(v) => {
                for (to, from) in v[span].iter_mut().zip(row) {
                    *to = f16::from_f64(from.wide());
                }
            }
        }
    }

    /// Makes room for exactly `rows` rows more: growth by a fraction keeps the slack small.
    fn reserve(&mut self, rows: usize) {
        let width = self.width;
        each!(&mut self.values, v => {
            let wanted = rows * width;
            if v.capacity() - v.len() < wanted {
                v.reserve_exact(wanted.max(v.len() / 8));
            }
        });
    }

    /// Appends one row.
    pub fn push(&mut self, row: &[T]) {
        self.reserve(1);
        let index = self.len();
        each!(&mut self.values, v => v.resize((index + 1) * self.width, Default::default()));
        self.set(index, row);
    }

    /// Appends whole rows.
    pub fn extend(&mut self, rows: &[T]) {
        rows.chunks_exact(self.width).for_each(|row| self.push(row));
    }

    /// Whether [`RowStore::read`] borrows.
    pub fn is_native(&self) -> bool {
        matches!(self.values, Values::Native(_))
    }

    /// Appends row `index` of `other`, which has the same dtype, without rounding again.
    pub fn push_from(&mut self, other: &Self, index: usize) {
        self.reserve(1);
        let span = index * self.width..(index + 1) * self.width;
        match (&mut self.values, &other.values) {
            (Values::Native(to), Values::Native(from)) => to.extend_from_slice(&from[span]),
            (Values::Bf16(to), Values::Bf16(from)) => to.extend_from_slice(&from[span]),
            (Values::F16(to), Values::F16(from)) => to.extend_from_slice(&from[span]),
            _ => unreachable!("rows move between stores of one state"),
        }
    }

    /// Drops row `index`; the last row takes its place.
    pub fn swap_remove(&mut self, index: usize) {
        let last = self.len() - 1;
        each!(&mut self.values, v => {
            v.copy_within(last * self.width..(last + 1) * self.width, index * self.width);
            v.truncate(last * self.width);
        });
    }

    /// Rows `start..end` in the kernel's type: borrowed if stored so, else widened into `scratch`.
    pub fn read<'a>(&'a self, start: usize, end: usize, scratch: &'a mut Vec<T>) -> &'a [T] {
        let span = start * self.width..end * self.width;
        match &self.values {
            Values::Native(v) => &v[span],
            Values::Bf16(v) => {
                let v = &v[span];
                scratch.resize(v.len(), T::nan());
                vectorize(
                    #[inline(always)]
                    || {
                        // bf16 is the upper half of an f32.
                        for (to, from) in scratch.iter_mut().zip(v) {
                            *to = widen(f32::from_bits(u32::from(from.to_bits()) << 16));
                        }
                    },
                );
                scratch
            }
            Values::F16(v) => {
                let mut wide = vec![0.0_f32; span.len()];
                v[span].convert_to_f32_slice(&mut wide);
                scratch.clear();
                scratch.extend(wide.into_iter().map(widen::<T>));
                scratch
            }
        }
    }
}

#[inline(always)]
fn widen<T: Real>(x: f32) -> T {
    T::of(f64::from(x))
}
