//! The salient rows of a layer's sequences, and under a cap what they were ranked by.

use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Result};
use still_kernels::{STILL_INT4, STILL_INT8, STILL_PLAIN};

use super::layout::uninit;
use crate::RowDtype;
use crate::config::FOUR_BIT_GROUP;

/// Chunks that there is room for beyond what is asked: a thousand tokens between two growths at the least.
const SPARE: usize = 16;

/// How rows are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coding {
    /// As the kernels name it.
    pub kind: i32,
    /// Of a row's values.
    value_bytes: usize,
    /// Of its scales, which lie behind the values of all rows.
    scale_bytes: usize,
}

impl Coding {
    /// Of rows of `width` values: as codes, or as values of `plain_bytes` each.
    pub fn new(rows: RowDtype, width: usize, plain_bytes: usize) -> Self {
        let groups = width.div_ceil(FOUR_BIT_GROUP);
        let (kind, value_bytes, scale_bytes) = match rows {
            RowDtype::Int8 => (STILL_INT8, width, size_of::<f32>()),
            RowDtype::Int4 => {
                (STILL_INT4, groups * FOUR_BIT_GROUP / 2, groups * 2 * size_of::<u16>())
            }
            RowDtype::F32 | RowDtype::Bf16 | RowDtype::F16 => (STILL_PLAIN, width * plain_bytes, 0),
        };
        Self { kind, value_bytes, scale_bytes }
    }

    fn row_bytes(&self) -> usize {
        self.value_bytes + self.scale_bytes
    }
}

/// K and V rows of the salient tokens, `[B, rows, D]` each, or their codes with the scales of all behind: room for equally many
/// retired chunks of every sequence. A head's rows lie together; in order, unless there is a cap: what is kept then takes the
/// place of what is demoted.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub k: CudaSlice<u8>,
    pub v: CudaSlice<u8>,
    /// Scores and positions, `[B, rows]`: under a cap.
    pub ranks: Option<(CudaSlice<f32>, CudaSlice<i32>)>,
    /// The first row of each head.
    pub offsets: CudaSlice<i64>,
    /// Rows of one sequence.
    pub rows: usize,
    /// Retired chunks of a sequence.
    chunks: usize,
    /// How often the rows have moved.
    pub moves: usize,
    coding: Coding,
    cap: Option<usize>,
}

impl Store {
    pub fn new(
        device: &CudaDevice,
        batch: usize,
        budgets: &[i32],
        coding: Coding,
        cap: Option<usize>,
        chunks: usize,
    ) -> Result<Self> {
        let offsets: Vec<i64> = starts(budgets, cap, chunks).map(|start| start as i64).collect();
        let rows = budgets.iter().map(|&budget| kept(cap, budget, chunks)).sum::<usize>();
        let ranks = match cap {
            Some(_) => Some((uninit(device, batch * rows)?, uninit(device, batch * rows)?)),
            None => None,
        };
        Ok(Self {
            k: uninit(device, batch * rows * coding.row_bytes())?,
            v: uninit(device, batch * rows * coding.row_bytes())?,
            ranks,
            offsets: device.clone_htod(&offsets)?,
            rows,
            chunks,
            moves: 0,
            coding,
            cap,
        })
    }

    /// Makes room for `chunks` retired chunks of a sequence; `held` are those that each has.
    ///
    /// It grows by an eighth, so that a long sequence's store has no more than that to spare and yet a row is copied eight
    /// times at most. Where every head has room up to its cap, nothing moves any more.
    pub fn reserve(
        &mut self,
        device: &CudaDevice,
        budgets: &[i32],
        chunks: usize,
        held: &[usize],
    ) -> Result<()> {
        if chunks <= self.chunks {
            return Ok(());
        }
        let room = chunks.max(self.chunks + self.chunks / 8) + SPARE;
        let cap = self.cap;
        let mut grown = Self::new(device, held.len(), budgets, self.coding, cap, room)?;
        if cap.is_some() && grown.rows == self.rows {
            self.chunks = room;
            return Ok(());
        }
        // Where scales begin.
        let scales =
            [self.rows, grown.rows].map(|rows| held.len() * rows * self.coding.value_bytes);
        for (sequence, &held) in held.iter().enumerate() {
            let (old, new) = (starts(budgets, cap, self.chunks), starts(budgets, cap, room));
            for ((from, to), &budget) in old.zip(new).zip(budgets) {
                let rows = kept(cap, budget, held);
                if rows == 0 {
                    continue;
                }
                let (from, to) = (sequence * self.rows + from, sequence * grown.rows + to);
                for (old, new) in [(&self.k, &mut grown.k), (&self.v, &mut grown.v)] {
                    let Coding { value_bytes, scale_bytes, .. } = self.coding;
                    copy(device, (old, from), (new, to), rows, value_bytes)?;
                    if scale_bytes > 0 {
                        let old = old.slice(scales[0]..);
                        let mut new = new.slice_mut(scales[1]..);
                        let span = |at: usize| at * scale_bytes..(at + rows) * scale_bytes;
                        device.memcpy_dtod(&old.slice(span(from)), &mut new.slice_mut(span(to)))?;
                    }
                }
                if let (Some(old), Some(new)) = (&self.ranks, &mut grown.ranks) {
                    copy(device, (&old.0, from), (&mut new.0, to), rows, 1)?;
                    copy(device, (&old.1, from), (&mut new.1, to), rows, 1)?;
                }
            }
        }
        *self = Self { moves: self.moves + 1, ..grown };
        Ok(())
    }

    /// How its rows are kept, as the kernels name it.
    pub fn kind(&self) -> i32 {
        self.coding.kind
    }

    /// Copies of the rows, K and V.
    pub fn copies(&self, device: &CudaDevice) -> Result<[CudaSlice<u8>; 2]> {
        let copy = |from: &CudaSlice<u8>| {
            let mut to = uninit(device, from.len())?;
            device.memcpy_dtod(from, &mut to)?;
            Ok::<_, candle_core::Error>(to)
        };
        Ok([copy(&self.k)?, copy(&self.v)?])
    }

    pub fn size_bytes(&self) -> usize {
        let ranks = self.ranks.as_ref().map_or(0, |(a, b)| a.num_bytes() + b.num_bytes());
        self.k.num_bytes() + self.v.num_bytes() + self.offsets.num_bytes() + ranks
    }
}

/// Copies `rows` rows of `width` values.
fn copy<T: DeviceRepr>(
    device: &CudaDevice,
    (old, from): (&CudaSlice<T>, usize),
    (new, to): (&mut CudaSlice<T>, usize),
    rows: usize,
    width: usize,
) -> Result<()> {
    let mut new = new.slice_mut(to * width..(to + rows) * width);
    device.memcpy_dtod(&old.slice(from * width..(from + rows) * width), &mut new)
}

/// The first row of each head in a store of `chunks` chunks.
fn starts(budgets: &[i32], cap: Option<usize>, chunks: usize) -> impl Iterator<Item = usize> + '_ {
    budgets.iter().scan(0, move |next, &budget| {
        let start = *next;
        *next += kept(cap, budget, chunks);
        Some(start)
    })
}

/// Salient tokens of a head after so many retirements.
pub(super) fn kept(cap: Option<usize>, budget: i32, retired: usize) -> usize {
    (budget as usize * retired).min(cap.unwrap_or(usize::MAX))
}
