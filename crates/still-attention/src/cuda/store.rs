//! The salient rows of a layer's sequences.

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result};

use super::launch::uninit;

/// Chunks that there is room for beyond what is asked: a thousand tokens between two growths at the least.
const SPARE: usize = 16;

/// K and V rows of the salient tokens, `[B, rows, D]` each: room for equally many retired chunks of every sequence. A head's
/// rows lie together, in order.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub k: CudaSlice<u8>,
    pub v: CudaSlice<u8>,
    /// The first row of each head.
    pub offsets: CudaSlice<i64>,
    /// Rows of one sequence.
    pub rows: usize,
    /// Retired chunks of a sequence.
    chunks: usize,
    /// How often the rows have moved.
    pub moves: usize,
    row_bytes: usize,
}

impl Store {
    pub fn new(
        device: &CudaDevice,
        batch: usize,
        budgets: &[i32],
        row_bytes: usize,
        chunks: usize,
    ) -> Result<Self> {
        let offsets: Vec<i64> = starts(budgets, chunks).map(|start| start as i64).collect();
        let rows = budgets.iter().map(|&budget| budget as usize).sum::<usize>() * chunks;
        Ok(Self {
            k: uninit(device, batch * rows * row_bytes)?,
            v: uninit(device, batch * rows * row_bytes)?,
            offsets: device.clone_htod(&offsets)?,
            rows,
            chunks,
            moves: 0,
            row_bytes,
        })
    }

    /// Makes room for `chunks` retired chunks of a sequence; `held` are those that each has.
    ///
    /// It grows by an eighth, so that a long sequence's store has no more than that to spare and yet a row is copied eight
    /// times at most.
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
        let mut grown = Self::new(device, held.len(), budgets, self.row_bytes, room)?;
        for (sequence, &held) in held.iter().enumerate() {
            let heads = starts(budgets, self.chunks).zip(starts(budgets, room)).zip(budgets);
            for ((from, to), &budget) in heads {
                let bytes = held * budget as usize * self.row_bytes;
                if bytes == 0 {
                    continue;
                }
                let from = (sequence * self.rows + from) * self.row_bytes;
                let to = (sequence * grown.rows + to) * self.row_bytes;
                for (old, new) in [(&self.k, &mut grown.k), (&self.v, &mut grown.v)] {
                    let mut new = new.slice_mut(to..to + bytes);
                    device.memcpy_dtod(&old.slice(from..from + bytes), &mut new)?;
                }
            }
        }
        *self = Self { moves: self.moves + 1, ..grown };
        Ok(())
    }

    pub fn size_bytes(&self) -> usize {
        self.k.num_bytes() + self.v.num_bytes() + self.offsets.num_bytes()
    }
}

/// The first row of each head in a store of `chunks` chunks.
fn starts(budgets: &[i32], chunks: usize) -> impl Iterator<Item = usize> + '_ {
    budgets.iter().scan(0, move |next, &budget| {
        let start = *next;
        *next += budget as usize * chunks;
        Some(start)
    })
}
