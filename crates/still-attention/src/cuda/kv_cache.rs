//! Keys and values of every token on CUDA: the teacher's cache.

use std::sync::Arc;

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{DType, Device, DeviceLocation, Tensor};
use still_compute::cuda::{Launch, PassScratch, StepMemory};
use still_kernels::STILL_PLAIN;
use still_kernels::dense::DenseSequence;

use super::dense::{
    Spans, StepRows, append, by_ops, decode, forward, has_decode, has_forward, widen,
};
use super::dense_rows::{DenseRows, restore_nothing, save_nothing};
use super::graph_state::{GraphState, GraphStep, IDLE, StepRotation};
use super::step_table::TableState;
use super::store::Coding;
use super::support;
use crate::arguments::{checked_lengths, expect_shape};
use crate::attention_state::{cannot_truncate, without_gate};
use crate::{
    AttentionError, AttentionKind, AttentionRows, AttentionState, HeadGeometry, Result, RowDtype,
    SavedState,
};

const OP: &str = "CudaKvCache::advance";

/// Tokens that there is room for beyond what is asked.
const SPARE: usize = 1024;

/// Keys and values of every token of a batch of sequences on a CUDA device: one layer.
#[derive(Debug)]
pub struct CudaKvCache {
    geometry: HeadGeometry,
    device: Device,
    /// Of queries, and of keys and values as they come.
    dtype: DType,
    coding: Coding,
    /// None before the first token.
    rows: Option<DenseRows>,
    /// Tokens fed to each sequence.
    positions: Vec<usize>,
    /// `[B, H]`, zeros between steps.
    arrived: CudaSlice<u32>,
    moves: usize,
    /// Another one whenever the rows move.
    memory: Arc<()>,
}

/// A copy has memory of its own; like that of a `Vec`, making one panics where there is no memory left.
impl Clone for CudaKvCache {
    fn clone(&self) -> Self {
        let copy = |rows: &DenseRows| {
            rows.copy().unwrap_or_else(|error| panic!("copying keys and values: {error}"))
        };
        Self {
            rows: self.rows.as_ref().map(copy),
            device: self.device.clone(),
            positions: self.positions.clone(),
            arrived: self.arrived.clone(),
            memory: Arc::default(),
            ..*self
        }
    }
}

impl CudaKvCache {
    /// An empty cache of `batch` sequences on `device`, whose rows are kept as they come, in `dtype`: f32 or bf16.
    ///
    /// # Errors
    /// Another dtype or device; no sequence.
    pub fn new(
        geometry: HeadGeometry,
        batch: usize,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let rows = if dtype == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 };
        Self::with_rows(geometry, batch, device, dtype, rows)
    }

    /// The same whose rows are kept as `rows`: as they come, in int8 or, where they come in f32, in int4. A token meets its own key
    /// and value as they are kept.
    ///
    /// # Errors
    /// As [`new`](Self::new); a format without a kernel, or without one for the head dimension.
    pub fn with_rows(
        geometry: HeadGeometry,
        batch: usize,
        device: &Device,
        dtype: DType,
        rows: RowDtype,
    ) -> Result<Self> {
        support::check_dtype("the rows of a cache", dtype)?;
        support::check_row_dtype(rows, dtype)?;
        support::check_dense_rows(rows, dtype, geometry.head_dim)?;
        let Device::Cuda(cuda) = device else {
            return Err(no_cache());
        };
        if batch == 0 {
            return Err(no_cache());
        }
        let arrived = cuda.alloc_zeros(batch * geometry.num_heads)?;
        Ok(Self {
            geometry,
            device: device.clone(),
            dtype,
            coding: Coding::new(rows, geometry.head_dim, dtype.size_in_bytes()),
            rows: None,
            positions: vec![0; batch],
            arrived,
            moves: 0,
            memory: Arc::default(),
        })
    }

    /// Feeds `T` tokens more to each sequence and returns their attention output, `[B, H, T, D]` of the rows' dtype; shapes and
    /// `lengths` as in [`crate::CudaHybridState::advance`].
    ///
    /// # Errors
    /// Shapes that contradict the cache; another dtype or device; no memory left on the device.
    pub fn advance(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        self.advance_fed([q, k, v], lengths, &PassScratch::default())
    }

    fn advance_fed(
        &mut self,
        [q, k, v]: [&Tensor; 3],
        lengths: Option<&[usize]>,
        scratch: &PassScratch,
    ) -> Result<Tensor> {
        let batch = self.positions.len();
        support::check_fed(OP, [q, k, v], self.geometry, batch, self.dtype, &self.device)?;
        let tokens = q.dim(2)?;
        let lengths = checked_lengths(OP, lengths, batch, tokens)?;
        let ends = self.positions.iter().zip(&lengths).map(|(start, length)| start + length);
        let ends: Vec<usize> = ends.collect();
        let out = if tokens == 1 && self.has_steps() {
            self.feed([q, k, v], &lengths)?
        } else if has_forward(q) || self.coding() != STILL_PLAIN {
            let rows = self.rows(ends.iter().copied().max().unwrap_or(0))?;
            let device = self.device.as_cuda_device()?;
            let spans = Spans::new(device, &self.positions, &lengths, scratch)?;
            append([k, v], &rows, &spans)?;
            match rows.plain() {
                Some(rows) => forward(q, rows.each_ref(), Some(&spans))?,
                None => self.answer_from_codes(q, &rows, &spans, &lengths)?,
            }
        } else {
            self.read_by_ops([q, k, v], &lengths)?
        };
        self.positions = ends;
        Ok(out)
    }

    /// One token of each sequence whose length is 1.
    fn feed(&mut self, [q, k, v]: [&Tensor; 3], lengths: &[usize]) -> Result<Tensor> {
        let ends = self.positions.iter().zip(lengths).map(|(start, length)| start + length);
        let rows = self.rows(ends.max().unwrap_or(0))?;
        let out = match lengths.contains(&0) {
            // SAFETY: the kernel writes the rows of all sequences.
            false => unsafe { q.empty_like()? },
            true => Tensor::zeros(q.shape(), q.dtype(), q.device())?,
        };
        let position = |(&start, &length): (&usize, &usize)| match length {
            0 => IDLE,
            _ => start as u32,
        };
        let positions: Vec<u32> = self.positions.iter().zip(lengths).map(position).collect();
        let positions = Tensor::from_vec(positions, lengths.len(), q.device())?;
        let (cache, memory) = (StepRows::Cache(&rows), StepMemory::default());
        decode([q, k, v, &out], cache, &positions, &self.arrived, None, &memory)?;
        Ok(out)
    }

    /// The output of any number of tokens, whose keys and values are among `rows`, which are codes.
    fn answer_from_codes(
        &self,
        q: &Tensor,
        rows: &DenseRows,
        spans: &Spans,
        lengths: &[usize],
    ) -> Result<Tensor> {
        let all = self.positions.iter().max().unwrap_or(&0) + q.dim(2)?;
        let [k, v] = widen(rows, (self.geometry, all), self.dtype, spans)?;
        if has_forward(q) {
            return Ok(forward(q, [&k, &v], Some(spans))?);
        }
        self.answer_by_ops(q, [&k, &v], lengths)
    }

    /// Any number of tokens, of head dimensions that have no kernel.
    fn read_by_ops(&mut self, [q, k, v]: [&Tensor; 3], lengths: &[usize]) -> Result<Tensor> {
        let (tokens, starts) = (q.dim(2)?, self.positions.clone());
        // Padding is computed like everything else, against keys that are zeros.
        let all = starts.iter().max().unwrap_or(&0) + tokens;
        let rows = self.rows(all)?;
        let rows = rows.plain().ok_or_else(no_room)?;
        let together = starts_together(&starts, lengths, tokens);
        for (to, from) in rows.iter().zip([k, v]) {
            if together {
                to.slice_set(&from.detach().contiguous()?, 2, starts[0])?;
                continue;
            }
            for sequence in (0..starts.len()).filter(|&b| lengths[b] > 0) {
                let new = from.detach().narrow(0, sequence, 1)?.narrow(2, 0, lengths[sequence])?;
                let to = to.narrow(0, sequence, 1)?;
                to.slice_set(&new.contiguous()?, 2, starts[sequence])?;
            }
        }
        let (k, v) = (rows[0].narrow(2, 0, all)?, rows[1].narrow(2, 0, all)?);
        self.answer_by_ops(q, [&k, &v], lengths)
    }

    /// The output of tokens whose keys and values are among `k` and `v` `[B, K, the most positions + T, D]`.
    fn answer_by_ops(&self, q: &Tensor, [k, v]: [&Tensor; 2], lengths: &[usize]) -> Result<Tensor> {
        let (batch, tokens, starts) = (self.positions.len(), q.dim(2)?, &self.positions);
        if starts_together(starts, lengths, tokens) {
            return by_ops(q, [k, v], &starts[..1]);
        }
        let out = by_ops(q, [k, v], starts)?;
        if lengths.iter().all(|&length| length == tokens) {
            return Ok(out);
        }
        let valid = lengths.iter().flat_map(|&n| (0..tokens).map(move |t| u8::from(t < n)));
        let valid =
            Tensor::from_vec(valid.collect::<Vec<u8>>(), (batch, 1, tokens, 1), q.device())?;
        Ok(valid.broadcast_as(out.shape())?.where_cond(&out, &out.zeros_like()?)?)
    }

    /// As [`GraphStep::step`].
    ///
    /// # Errors
    /// As there; a head dimension without a kernel.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn step(
        &self,
        [q, k, v]: [&Tensor; 3],
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
    ) -> Result<Tensor> {
        self.step_in([q, k, v], positions, rotation, &StepMemory::default())
    }

    fn step_in(
        &self,
        fed: [&Tensor; 3],
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor> {
        let rows = self.rows.as_ref().ok_or_else(no_room)?;
        let (at, cache) = ((self.geometry, self.batch(), self.dtype), StepRows::Cache(rows));
        step(fed, at, cache, positions, &self.arrived, rotation, memory)
    }

    fn has_steps(&self) -> bool {
        has_decode(self.geometry.head_dim)
    }

    /// The rows, with room for `tokens` tokens of a sequence. It grows by an eighth, so that a long cache has no more than that
    /// to spare.
    fn rows(&mut self, tokens: usize) -> Result<DenseRows> {
        let capacity = self.rows.as_ref().map_or(Ok(0), DenseRows::room)?;
        if let Some(rows) = self.rows.as_ref().filter(|_| tokens <= capacity) {
            return Ok(rows.clone());
        }
        let room = tokens.max(capacity + capacity / 8) + SPARE;
        let rows = match &self.rows {
            Some(rows) => rows.grown(room)?,
            None => {
                let heads = self.geometry.num_key_value_heads;
                let shape = [self.positions.len(), heads, room];
                DenseRows::new(self.coding, self.dtype, shape, &self.device)?
            }
        };
        self.rows = Some(rows.clone());
        self.moves += 1;
        self.memory = Arc::default();
        Ok(rows)
    }

    pub(super) fn geometry(&self) -> HeadGeometry {
        self.geometry
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// How rows are kept, as the kernels name it.
    pub(super) fn coding(&self) -> i32 {
        self.coding.kind
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Another one whenever the rows have moved.
    pub(super) fn memory(&self) -> &Arc<()> {
        &self.memory
    }

    /// Where the cache of one sequence lies.
    pub(super) fn place(&self) -> Result<DenseSequence> {
        let rows = self.rows.as_ref().ok_or_else(no_room)?;
        let stream = self.device.as_cuda_device()?.cuda_stream();
        let held = rows.held();
        Ok(held.entry(&mut Launch::new(&stream)?)?)
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.positions.len()
    }
}

/// A step of `batch` sequences, whose rows are `dtype`: the output, in `memory`.
pub(super) fn step(
    [q, k, v]: [&Tensor; 3],
    (geometry, batch, dtype): (HeadGeometry, usize, DType),
    cache: StepRows<'_>,
    positions: &Tensor,
    arrived: &CudaSlice<u32>,
    rotation: Option<StepRotation<'_>>,
    memory: &StepMemory,
) -> Result<Tensor> {
    support::check_fed(OP, [q, k, v], geometry, batch, dtype, positions.device())?;
    expect_shape(OP, "q", q, &[batch, geometry.num_heads, 1, geometry.head_dim])?;
    expect_shape(OP, "positions", positions, &[batch])?;
    support::require(positions.dtype() == DType::U32, "positions", "u32", || {
        positions.dtype().as_str().into()
    })?;
    if let Some(rotation) = rotation {
        support::check_rotation(rotation, batch, geometry.head_dim)?;
    }
    let out = memory.tensor(("attention", 0), q.shape(), q.dtype(), q.device())?;
    decode([q, k, v, &out], cache, positions, arrived, rotation, memory)?;
    Ok(out)
}

/// Whether sequences at `starts` are fed `tokens` tokens each from one position on.
fn starts_together(starts: &[usize], lengths: &[usize], tokens: usize) -> bool {
    starts.iter().all(|&start| start == starts[0]) && lengths.iter().all(|&n| n == tokens)
}

fn no_room() -> AttentionError {
    let what = "a step of a dense cache on CUDA has no room: reserve it first";
    AttentionError::Config(what.into())
}

fn no_cache() -> AttentionError {
    AttentionError::Config("a cache on CUDA has one sequence or more and a CUDA device".into())
}

impl GraphStep for CudaKvCache {
    unsafe fn step(
        &self,
        rows: AttentionRows<'_>,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor> {
        without_gate(&rows)?;
        self.step_in([rows.q, rows.k, rows.v], positions, rotation, memory)
    }

    fn rotates(&self, rotary: usize) -> bool {
        support::rotates(rotary)
    }

    fn generation(&self) -> usize {
        self.moves
    }
}

impl GraphState for CudaKvCache {
    fn moves(&self) -> usize {
        self.moves
    }

    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.rows(tokens).map(|_| ())
    }

    fn count(&mut self) {
        self.positions.iter_mut().for_each(|position| *position += 1);
    }

    fn in_table(&self) -> TableState<'_> {
        TableState::Dense(self)
    }
}

impl AttentionState for CudaKvCache {
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor> {
        without_gate(&rows)?;
        self.advance(rows.q, rows.k, rows.v, lengths)
    }

    fn advance_in(
        &mut self,
        rows: AttentionRows<'_>,
        lengths: Option<&[usize]>,
        scratch: &PassScratch,
    ) -> Result<Tensor> {
        without_gate(&rows)?;
        self.advance_fed([rows.q, rows.k, rows.v], lengths, scratch)
    }

    fn kind(&self) -> AttentionKind {
        AttentionKind::Dense
    }

    fn location(&self) -> DeviceLocation {
        self.device.location()
    }

    fn position(&self, sequence: usize) -> usize {
        self.positions[sequence]
    }

    fn size_bytes(&self) -> usize {
        // With the room to grow into.
        self.rows.as_ref().map_or(0, DenseRows::size_bytes) + self.arrived.num_bytes()
    }

    fn used_bytes(&self) -> usize {
        let row = 2 * self.geometry.num_key_value_heads * self.coding.row_bytes();
        row * self.positions.iter().sum::<usize>()
    }

    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()> {
        match self.positions[sequence] {
            position if tokens > position => {
                Err(cannot_truncate(tokens, &format!("it has {position}")))
            }
            _ => Ok(()),
        }
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        self.check_truncate(sequence, tokens)?;
        self.positions[sequence] = tokens;
        Ok(())
    }

    fn save(&self) -> Result<SavedState> {
        let heads = self.geometry.num_key_value_heads;
        let mut saved = SavedState::default();
        for (sequence, &tokens) in self.positions.iter().enumerate() {
            let first = sequence * heads;
            match self.rows.as_ref().filter(|_| tokens > 0) {
                Some(rows) => rows.save(sequence, tokens, &mut saved, first)?,
                None => save_nothing(self.coding, heads, &mut saved, first)?,
            }
        }
        Ok(saved)
    }

    fn restore(&mut self, mut saved: SavedState) -> Result<()> {
        let heads = self.geometry.num_key_value_heads;
        self.positions.fill(0);
        for sequence in 0..self.positions.len() {
            let first = sequence * heads;
            // Heads of a sequence have equally many.
            match saved.rows(first, "k").unwrap_or(0) {
                0 => restore_nothing(self.coding, heads, &mut saved, first)?,
                tokens => {
                    self.rows(tokens)?.restore(sequence, tokens, &mut saved, first)?;
                    self.positions[sequence] = tokens;
                }
            }
        }
        saved.check_all_taken()
    }

    fn boxed_clone(&self) -> Box<dyn AttentionState> {
        Box::new(self.clone())
    }

    fn in_graph(&mut self) -> Option<&mut dyn GraphState> {
        if self.has_steps() { Some(self) } else { None }
    }
}
