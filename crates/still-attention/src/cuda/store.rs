//! The salient rows of a layer's sequences, and under a cap what they were ranked by.

use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Result};

use super::layout::uninit;

/// Chunks that there is room for beyond what is asked: a thousand tokens between two growths at the least.
const SPARE: usize = 16;

/// K and V rows of the salient tokens, `[B, rows, D]` each: room for equally many retired chunks of every sequence. A head's
/// rows lie together; in order, unless there is a cap: what is kept then takes the place of what is demoted.
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
    row_bytes: usize,
    cap: Option<usize>,
}

impl Store {
    pub fn new(
        device: &CudaDevice,
        batch: usize,
        budgets: &[i32],
        row_bytes: usize,
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
            k: uninit(device, batch * rows * row_bytes)?,
            v: uninit(device, batch * rows * row_bytes)?,
            ranks,
            offsets: device.clone_htod(&offsets)?,
            rows,
            chunks,
            moves: 0,
            row_bytes,
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
        let mut grown = Self::new(device, held.len(), budgets, self.row_bytes, cap, room)?;
        if cap.is_some() && grown.rows == self.rows {
            self.chunks = room;
            return Ok(());
        }
        for (sequence, &held) in held.iter().enumerate() {
            let (old, new) = (starts(budgets, cap, self.chunks), starts(budgets, cap, room));
            for ((from, to), &budget) in old.zip(new).zip(budgets) {
                let rows = kept(cap, budget, held);
                if rows == 0 {
                    continue;
                }
                let (from, to) = (sequence * self.rows + from, sequence * grown.rows + to);
                copy(device, (&self.k, from), (&mut grown.k, to), rows, self.row_bytes)?;
                copy(device, (&self.v, from), (&mut grown.v, to), rows, self.row_bytes)?;
                if let (Some(old), Some(new)) = (&self.ranks, &mut grown.ranks) {
                    copy(device, (&old.0, from), (&mut new.0, to), rows, 1)?;
                    copy(device, (&old.1, from), (&mut new.1, to), rows, 1)?;
                }
            }
        }
        *self = Self { moves: self.moves + 1, ..grown };
        Ok(())
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
