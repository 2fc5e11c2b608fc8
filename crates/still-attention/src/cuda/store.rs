//! The salient rows of a layer's sequences, and under a cap what they were ranked by.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Arc;

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result};
use still_compute::cuda::Launch;
use still_kernels::{NO_CAP, STILL_INT4, STILL_INT8, STILL_PLAIN, check, still_grow_store};

use super::layout::uninit;
use super::sections::Sections;
use crate::RowDtype;
use crate::config::FOUR_BIT_GROUP;

/// Chunks that there is room for beyond what is asked: a thousand tokens between two growths at the least.
const SPARE: usize = 16;

/// Words of a `StillStore`.
const STORE_WORDS: usize = 6;
const _: () = assert!(size_of::<still_kernels::Store>() == STORE_WORDS * size_of::<u64>());

/// How rows are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coding {
    /// As the kernels name it.
    pub kind: i32,
    /// Values of a row.
    pub width: usize,
    /// Of a row's values.
    pub value_bytes: usize,
    /// Of its scales, which lie behind the values of all rows.
    pub scale_bytes: usize,
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
        Self { kind, width, value_bytes, scale_bytes }
    }

    pub fn row_bytes(&self) -> usize {
        self.value_bytes + self.scale_bytes
    }

    /// The words that scale a row's codes.
    pub fn scale_words(&self) -> usize {
        self.scale_bytes / size_of::<u32>()
    }
}

/// Arrays of [`Store::held`]: K and V rows of the salient tokens, `[B, rows, D]` each, or their codes with the scales of all behind;
/// scores and positions, `[B, rows]`, under a cap.
pub(super) const K: usize = 0;
pub(super) const V: usize = 1;
pub(super) const SCORE: usize = 2;
pub(super) const TOKEN: usize = 3;

/// K and V rows of the salient tokens: room for equally many
/// retired chunks of every sequence. A head's rows lie together; in order, unless there is a cap: what is kept then takes the
/// place of what is demoted.
#[derive(Debug)]
pub(super) struct Store {
    pub held: Sections<4>,
    /// The first row of each head; the same in all copies.
    offsets: Arc<CudaSlice<i64>>,
    /// Rows of one sequence.
    pub rows: usize,
    /// Where all that lies, as the kernels of a state look it up: a `StillStore`. It stays where it is when the store grows, so that
    /// a captured step need not be captured again.
    there: CudaSlice<u64>,
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
        let (side, ranks) = (batch * rows * coding.row_bytes(), batch * rows * size_of::<f32>());
        let ranks = if cap.is_some() { ranks } else { 0 };
        let mut store = Self {
            held: Sections::new(device, [side, side, ranks, ranks])?,
            offsets: Arc::new(device.clone_htod(&offsets)?),
            rows,
            there: uninit(device, STORE_WORDS)?,
            chunks,
            moves: 0,
            coding,
            cap,
        };
        store.tell()?;
        Ok(store)
    }

    /// Queues that what the kernels look up is what there is.
    fn tell(&mut self) -> Result<()> {
        let stream = self.there.stream().clone();
        let mut launch = Launch::new(&stream)?;
        let still_kernels::Store { k, v, score, token, offset, entries } = self.args(&mut launch);
        let words = [k as u64, v as u64, score as u64, token as u64, offset as u64, entries as u64];
        drop(launch);
        stream.memcpy_htod(&words, &mut self.there).map_err(candle_core::Error::wrap)
    }

    /// Where kernels look up where the store lies.
    pub fn there<'a>(&'a self, launch: &mut Launch<'a>) -> *const still_kernels::Store {
        launch.at::<_, still_kernels::Store>(&self.there).cast_const()
    }

    /// Makes room for `chunks` retired chunks of a sequence; `held` are those that each has. `budgets`: of every head, on the host
    /// and on the device.
    ///
    /// It grows by an eighth, so that a long sequence's store has no more than that to spare and yet a row is copied eight
    /// times at most. Where every head has room up to its cap, nothing moves any more.
    pub fn reserve(
        &mut self,
        device: &CudaDevice,
        budgets: (&[i32], &CudaSlice<i32>),
        chunks: usize,
        held: &[usize],
    ) -> Result<()> {
        if chunks <= self.chunks {
            return Ok(());
        }
        let room = chunks.max(self.chunks + self.chunks / 8) + SPARE;
        let mut grown = Self::new(device, held.len(), budgets.0, self.coding, self.cap, room)?;
        if self.cap.is_some() && grown.rows == self.rows {
            self.chunks = room;
            return Ok(());
        }
        let most = held.iter().copied().max().unwrap_or(0);
        if most > 0 {
            self.copy_to(&grown, device, budgets.1, (held.len(), most))?;
        }
        std::mem::swap(&mut self.there, &mut grown.there);
        *self = Self { moves: self.moves + 1, ..grown };
        self.tell()
    }

    /// Queues a copy of what `batch` sequences have stored after `retired` chunks, at most, to a larger store.
    fn copy_to(
        &self,
        grown: &Self,
        device: &CudaDevice,
        budgets: &CudaSlice<i32>,
        (batch, retired): (usize, usize),
    ) -> Result<()> {
        let int = |x: usize| i32::try_from(x).map_err(candle_core::Error::wrap);
        let Coding { value_bytes, .. } = self.coding;
        let (batch, heads, retired) = (int(batch)?, int(budgets.len())?, int(retired)?);
        let (row_bytes, row_words) = (int(value_bytes)?, int(self.coding.scale_words())?);
        let cap = self.cap.map_or(Ok(NO_CAP), int)?;
        let stream = device.cuda_stream();
        let mut launch = Launch::new(&stream)?;
        let (budgets, from, to) =
            (launch.at(budgets), self.args(&mut launch), grown.args(&mut launch));
        // SAFETY: both stores have room for what is held, their rows lie as their offsets say, and all live until the launch is
        // dropped.
        let code = unsafe {
            still_grow_store(
                batch,
                heads,
                row_bytes,
                row_words,
                budgets,
                cap,
                retired,
                from,
                to,
                launch.stream(),
            )
        };
        check("still_grow_store", code).map_err(candle_core::Error::wrap)
    }

    /// The store as that kernel takes it.
    fn args<'a>(&'a self, launch: &mut Launch<'a>) -> still_kernels::Store {
        let [score, token] = match self.cap {
            Some(_) => [SCORE, TOKEN].map(|array| self.held.at(launch, array)),
            None => [null_mut::<c_void>(); 2],
        };
        still_kernels::Store {
            k: self.held.at(launch, K),
            v: self.held.at(launch, V),
            score: score.cast(),
            token: token.cast(),
            offset: launch.at(&self.offsets),
            entries: self.rows as i64,
        }
    }

    /// Whether scores and positions are held.
    pub fn is_ranked(&self) -> bool {
        self.cap.is_some()
    }

    /// How its rows are kept, as the kernels name it.
    pub fn kind(&self) -> i32 {
        self.coding.kind
    }

    /// How its rows are kept.
    pub fn coding(&self) -> Coding {
        self.coding
    }

    /// The first row of each head of a sequence.
    pub fn starts(&self, budgets: &[i32]) -> Vec<usize> {
        starts(budgets, self.cap, self.chunks).collect()
    }

    /// Where in `k` and `v` the values of `rows` rows from `first` on lie, and their scales. `batch`: sequences.
    pub fn places(&self, batch: usize, first: usize, rows: usize) -> [Range<usize>; 2] {
        let Coding { value_bytes, scale_bytes, .. } = self.coding;
        let scales = batch * self.rows * value_bytes;
        let rows = first..first + rows;
        [
            rows.start * value_bytes..rows.end * value_bytes,
            scales + rows.start * scale_bytes..scales + rows.end * scale_bytes,
        ]
    }

    pub fn size_bytes(&self) -> usize {
        self.held.num_bytes() + self.offsets.num_bytes()
    }
}

/// A copy has memory of its own, and says so to the kernels.
impl Clone for Store {
    fn clone(&self) -> Self {
        // SAFETY: `tell` fills it.
        let there = unsafe { self.there.stream().alloc(STORE_WORDS) };
        let mut copy = Self {
            held: self.held.clone(),
            offsets: Arc::clone(&self.offsets),
            there: there.expect("a few bytes on the device"),
            ..*self
        };
        copy.tell().expect("the device copies its own words");
        copy
    }
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
