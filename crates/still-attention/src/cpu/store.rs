//! Rows of K or V of one head, stored in the dtype that the state declares.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use smallvec::SmallVec;
use still_compute::Real;

use super::cells::{Cell, Cells, each};
use super::channel_codes::ChannelCodes;
use super::four_bit::FourBit;
use crate::Result;
use crate::config::RowDtype;
use crate::key_exponents::KeyExponents;
use crate::saved_state::SavedState;

/// Rows of one width in tiles of `TILE` rows, each tile transposed: channel `c` of row `r` is value `r mod TILE` of line `c` of tile
/// `r / TILE`. With tiles of one row that is one row after the other.
#[derive(Clone, Debug)]
pub(crate) struct Store<T, const TILE: usize> {
    pub(super) width: usize,
    rows: usize,
    pub(super) coded: Coded<T, TILE>,
    /// Of coded keys whose channels are scaled.
    pub(super) scaling: Option<Arc<Scaling<T>>>,
}

/// Powers of two, by channel.
#[derive(Clone, Debug)]
pub(super) struct Scaling<T> {
    /// What a row is multiplied by before it is coded.
    narrowing: Vec<T>,
    /// What it is multiplied by when it is read, or a query that meets it.
    pub widening: Vec<T>,
}

impl<T: Real> Scaling<T> {
    /// Multiplies rows that lie one after the other.
    pub fn widen(&self, rows: &mut [T]) {
        rows.chunks_exact_mut(self.widening.len()).for_each(|row| multiply(row, &self.widening));
    }
}

#[inline(always)]
fn multiply<T: Real>(row: &mut [T], by: &[T]) {
    row.iter_mut().zip(by).for_each(|(x, &by)| *x *= by);
}

/// How a store's values are coded: each by itself, in groups of a row, or in groups of a channel.
#[derive(Clone, Debug)]
pub(super) enum Coded<T, const TILE: usize> {
    Cells(Cells<T>),
    FourBit(FourBit<TILE>),
    ByChannel(ChannelCodes),
}

impl<T: Real, const TILE: usize> Store<T, TILE> {
    /// An empty store of rows of `width` channels; `RowDtype::F32` keeps the kernel's own type.
    pub fn new(width: usize, dtype: RowDtype) -> Self {
        let coded = match dtype {
            RowDtype::Int4 => Coded::FourBit(FourBit::new(width)),
            _ => Coded::Cells(Cells::new(dtype)),
        };
        Self::of(width, coded)
    }

    pub(super) fn of(width: usize, coded: Coded<T, TILE>) -> Self {
        Self { width, rows: 0, coded, scaling: None }
    }

    /// The same with channels scaled by these exponents, if rows are coded. For an empty store.
    #[must_use]
    pub fn scaled(self, exponents: Option<&KeyExponents>) -> Self {
        let scaling = exponents.filter(|_| self.is_coded()).map(|exponents| {
            Arc::new(Scaling { narrowing: exponents.powers(-1), widening: exponents.powers(1) })
        });
        Self { scaling, ..self }
    }

    fn is_coded(&self) -> bool {
        match &self.coded {
            Coded::Cells(cells) => cells.scales().is_some(),
            Coded::FourBit(_) | Coded::ByChannel(_) => true,
        }
    }

    /// Sets the number of rows; new ones are zero.
    pub fn resize(&mut self, rows: usize) {
        self.resize_memory(rows);
        self.rows = rows;
    }

    fn resize_memory(&mut self, rows: usize) {
        let whole = rows.next_multiple_of(TILE);
        match &mut self.coded {
            Coded::Cells(cells) => cells.resize(whole * self.width, whole),
            Coded::FourBit(codes) => codes.resize(whole),
            Coded::ByChannel(codes) => codes.resize(whole),
        }
    }

    pub fn len(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes of values and of scales.
    pub fn size_bytes(&self) -> [usize; 2] {
        match &self.coded {
            Coded::Cells(cells) => cells.size_bytes(),
            Coded::FourBit(codes) => codes.size_bytes(),
            Coded::ByChannel(codes) => codes.size_bytes(),
        }
    }

    /// Where the channels of row `index` begin; they are `TILE` values apart.
    fn start(&self, index: usize) -> usize {
        index / TILE * TILE * self.width + index % TILE
    }

    /// Where the values of the tile of row `index` lie.
    fn tile(&self, index: usize) -> Range<usize> {
        let first = index / TILE * TILE * self.width;
        first..first + TILE * self.width
    }

    /// Overwrites row `index`.
    ///
    /// # Panics
    /// If keys are coded by channel: they come in groups ([`extend`](Self::extend)).
    pub fn set(&mut self, index: usize, row: &[T]) {
        debug_assert_eq!(row.len(), self.width);
        let mut scaled: SmallVec<[T; 128]> = SmallVec::new();
        let row = match &self.scaling {
            None => row,
            Some(scaling) => {
                scaled.extend_from_slice(row);
                multiply(&mut scaled, &scaling.narrowing);
                &scaled
            }
        };
        let (tile, lane) = (self.tile(index), index % TILE);
        let cells = match &mut self.coded {
            Coded::Cells(cells) => cells,
            Coded::FourBit(codes) => return codes.set(index, row),
            Coded::ByChannel(_) => panic!("{IN_GROUPS}"),
        };
        let scale = cells.prepare(index, row);
        each!(&mut cells.values, v => {
            for (line, &x) in v[tile].as_chunks_mut::<TILE>().0.iter_mut().zip(row) {
                line[lane] = Cell::<T>::narrow(x * scale);
            }
        });
    }

    /// Makes room for so many more rows at once, so that appending them does not row by row.
    pub fn reserve(&mut self, rows: usize) {
        self.resize_memory(self.rows + rows);
        self.resize_memory(self.rows);
    }

    /// Appends one row.
    pub fn push(&mut self, row: &[T]) {
        self.resize(self.rows + 1);
        self.set(self.rows - 1, row);
    }

    /// Appends whole rows: keys that are coded by channel in groups of 32.
    pub fn extend(&mut self, rows: &[T]) {
        let held = self.rows;
        if let Coded::ByChannel(_) = self.coded {
            self.resize(held + rows.len() / self.width);
        }
        match &mut self.coded {
            Coded::ByChannel(codes) => {
                let narrowing = self.scaling.as_ref().map(|scaling| scaling.narrowing.as_slice());
                codes.write(held, rows, narrowing);
            }
            _ => rows.chunks_exact(self.width).for_each(|row| self.push(row)),
        }
    }

    /// Drops row `index`; the last row takes its place.
    ///
    /// # Panics
    /// If keys are coded by channel.
    pub fn swap_remove(&mut self, index: usize) {
        let last = self.rows - 1;
        let (from, to) = (self.start(last), self.start(index));
        match &mut self.coded {
            Coded::Cells(cells) => {
                each!(&mut cells.values, v => {
                    for channel in 0..self.width {
                        v[to + channel * TILE] = v[from + channel * TILE];
                    }
                });
                cells.move_scale(last, index);
            }
            Coded::FourBit(codes) => codes.copy_row(last, index),
            Coded::ByChannel(_) => panic!("{IN_GROUPS}"),
        }
        self.resize(last);
    }

    /// Drops all rows from `rows` on.
    pub fn truncate(&mut self, rows: usize) {
        if rows < self.rows {
            self.resize(rows);
        }
    }

    /// Row `index`, appended to `out`.
    pub fn append_row(&self, index: usize, out: &mut Vec<T>) {
        let start = out.len();
        self.append_coded_row(index, out);
        if let Some(scaling) = &self.scaling {
            scaling.widen(&mut out[start..]);
        }
    }

    fn append_coded_row(&self, index: usize, out: &mut Vec<T>) {
        let cells = match &self.coded {
            Coded::Cells(cells) => cells,
            Coded::FourBit(codes) => return codes.append_row(index, out),
            Coded::ByChannel(codes) => return codes.append_row(index, out),
        };
        let scale = cells.scale(index);
        let (tile, lane) = (self.tile(index), index % TILE);
        each!(&cells.values, v => {
            let lines = v[tile].as_chunks::<TILE>().0.iter();
            out.extend(lines.map(|line| Cell::<T>::widen(line[lane]) * scale));
        });
    }

    /// Where the values of all rows lie, row after row.
    fn places(&self) -> impl Iterator<Item = usize> {
        let (width, starts) = (self.width, (0..self.rows).map(|row| self.start(row)));
        starts.flat_map(move |start| (0..width).map(move |channel| start + channel * TILE))
    }

    /// Puts the rows among a state's tensors.
    pub fn save(&self, state: &mut SavedState, part: usize, name: &str) -> Result<()> {
        let cells = match &self.coded {
            Coded::Cells(cells) => cells,
            Coded::FourBit(codes) => return codes.save(state, part, name, self.rows),
            Coded::ByChannel(codes) => return codes.save(state, part, name, self.rows),
        };
        state.put(part, name, cells.saved(self.places(), (self.rows, self.width))?);
        if let Some(scales) = cells.scales() {
            let scales = Tensor::from_slice(&scales[..self.rows], self.rows, &Device::Cpu)?;
            state.put(part, &scale(name), scales);
        }
        Ok(())
    }

    /// Takes the rows back, `rows` of them if that is known.
    pub fn restore(
        &mut self,
        state: &mut SavedState,
        part: usize,
        name: &str,
        rows: Option<usize>,
    ) -> Result<()> {
        let dtype = match &mut self.coded {
            Coded::Cells(cells) => cells.saved_dtype(),
            Coded::FourBit(codes) => {
                self.rows = codes.restore(state, part, name, rows)?;
                return Ok(());
            }
            Coded::ByChannel(codes) => {
                self.rows = codes.restore(state, part, name, rows)?;
                return Ok(());
            }
        };
        let saved = state.take(part, name, dtype, &[rows, Some(self.width)])?;
        self.resize(saved.dim(0)?);
        let places: Vec<usize> = self.places().collect();
        if let Coded::Cells(cells) = &mut self.coded {
            cells.restore(places.into_iter(), &saved)?;
            if cells.scales().is_some() {
                let scales = state.take(part, &scale(name), T::DTYPE, &[Some(self.rows)])?;
                cells.restore_scales(&scales.to_vec1()?);
            }
        }
        Ok(())
    }
}

const IN_GROUPS: &str = "keys by channel come and stay in groups";

fn scale(name: &str) -> String {
    format!("{name}_scale")
}
