//! The recurrent state of hybrid attention on CUDA: one layer, a batch of sequences.

mod past;
mod saved;
pub(super) mod step;

use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::Arc;

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, DType, Device, DeviceLocation, Tensor};
use still_kernels::{
    CHUNK, Decode, NO_CAP, Rows, STILL_PLAIN, SequenceState, check, still_decode_fill,
};

use super::forward::{Last, Operands, forward};
use super::graph_state::{GraphState, GraphStep, IDLE, StepRotation};
use super::layout::{flags, router, shape};
use super::routing::{DeviceRouting, budgets, retired};
use super::sections::Sections;
use super::step_table::TableState;
use super::store::{Coding, Store, kept};
use super::{log_scale, support};
use crate::arguments::checked_lengths;
use crate::attention_state::check_truncate;
use crate::{
    AttentionError, AttentionKind, AttentionRows, AttentionState, HeadGeometry, HybridConfig,
    HybridWeights, LinearState, Result, RowDtype, SavedState,
};
use still_compute::cuda::{Launch, PassScratch, StepMemory, on_cuda};

use self::step::{Fed, StepState, splits};

const OP: &str = "CudaHybridState::advance";

/// Tokens of a head's window.
const RING: usize = 2 * CHUNK;

/// Arrays of [`CudaHybridState::held`]. K and V rows of the window `[B, S, 128, D]`, token `t` at `t % 128`.
const RING_K: usize = 0;
const RING_V: usize = 1;
/// `[B, S, 128]`
const RING_SCORE: usize = 2;
/// `[B, S, 2D, D]`
const S: usize = 3;
/// `[B, S, 2D]`
const Z: usize = 4;
/// `[B, S]`: under a cap, what a retirement's two kernels tell each other.
const ADMITTED: usize = 5;
/// `[B, S]`, zeros between steps.
const ARRIVED: usize = 6;

/// A layer's weights folded, rounded to the dtype of a state's rows and laid out on a CUDA device; made once by
/// [`CudaWeights::new`].
#[derive(Debug)]
pub struct CudaWeights {
    geometry: HeadGeometry,
    config: HybridConfig,
    device: CudaDevice,
    dtype: DType,
    /// `[H, D, D]`, reflections folded in.
    map_q: Tensor,
    /// `[S, D, D]`, reflections folded in.
    map_k: Tensor,
    /// `ln(n λ)`, `[H]` f32, with `LinearNorm::Mean`.
    log_scale: Option<Tensor>,
    /// `[S, D]`: what the channels of coded keys are multiplied by when they are read, where some are scaled.
    key_scale: Option<CudaSlice<f32>>,
    /// `[S]`
    budgets: CudaSlice<i32>,
    host_budgets: Vec<i32>,
}

impl CudaWeights {
    /// Folds Householder reflections into `W` and copies everything to `device`. `dtype` is that of queries, keys and values,
    /// and so of a state's exact rows: f32 or bf16.
    ///
    /// # Errors
    /// Shapes that contradict the configuration; a dtype, device or configuration without a kernel.
    pub fn new(
        geometry: HeadGeometry,
        config: &HybridConfig,
        weights: &HybridWeights,
        device: &Device,
        dtype: DType,
    ) -> Result<Arc<Self>> {
        config.validate(geometry)?;
        weights.check(geometry, config)?;
        support::check_dtype("the rows of a state", dtype)?;
        support::check_state(geometry, config, dtype)?;
        let Device::Cuda(on) = device else {
            return Err(AttentionError::Config("expected a CUDA device".into()));
        };
        let there = |tensor: &Tensor, dtype| {
            Ok::<_, AttentionError>(
                tensor.detach().to_device(device)?.to_dtype(dtype)?.contiguous()?,
            )
        };
        let (map_q, map_k) = weights.folded()?;
        let log_scale = log_scale(weights, config)?;
        let heads = geometry.selection_heads(config.selection_head);
        let host_budgets = budgets(config, heads);
        Ok(Arc::new(Self {
            geometry,
            config: config.clone(),
            device: on.clone(),
            dtype,
            map_q: there(&map_q, dtype)?,
            map_k: there(&map_k, dtype)?,
            log_scale: log_scale.as_ref().map(|scale| there(scale, DType::F32)).transpose()?,
            key_scale: key_scale(config, geometry)
                .map(|scale| on.clone_htod(&scale))
                .transpose()?,
            budgets: on.clone_htod(&host_budgets)?,
            host_budgets,
        }))
    }

    /// Selection heads, which are the kernels' KV heads.
    pub(super) fn heads(&self) -> usize {
        self.host_budgets.len()
    }

    pub(super) fn config(&self) -> &HybridConfig {
        &self.config
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// As the kernels take it.
    pub(super) fn key_scale<'a>(&'a self, launch: &mut Launch<'a>) -> *const f32 {
        self.key_scale.as_ref().map_or(null(), |scale| launch.at(scale))
    }

    /// Whether a kernel that is told of these is told the same of others.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let same = |weights: &Self| (weights.geometry, weights.dtype, weights.log_scale.is_some());
        self.config == other.config
            && same(self) == same(other)
            && self.map_q.device().same_device(other.map_q.device())
    }
}

/// `[S, D]`: powers of two by selection head, if some channel is scaled.
fn key_scale(config: &HybridConfig, geometry: HeadGeometry) -> Option<Vec<f32>> {
    let heads = geometry.selection_heads(config.selection_head);
    let exponents = |head: usize| config.key_exponents_of(geometry, head);
    (0..heads).any(|head| exponents(head).is_some()).then(|| {
        let ones = || vec![1.0; geometry.head_dim];
        (0..heads).flat_map(|h| exponents(h).map_or_else(ones, |e| e.powers(1))).collect()
    })
}

/// Everything a layer remembers of a batch of sequences, on a CUDA device: per sequence and selection head the window's ring,
/// the salient rows and the linear state in f32.
///
/// A copy has memory of its own; like that of a `Vec`, making one panics where there is no memory left.
#[derive(Debug)]
pub struct CudaHybridState {
    weights: Arc<CudaWeights>,
    /// Tokens fed to each sequence.
    positions: Vec<usize>,
    /// The window and the linear state.
    held: Sections<7>,
    store: Store,
    /// Blocks that share a head's store.
    splits: i32,
    /// What a table knows the state by: the store's words alone say where its rows have moved.
    memory: Arc<()>,
}

impl Clone for CudaHybridState {
    fn clone(&self) -> Self {
        Self {
            weights: self.weights.clone(),
            positions: self.positions.clone(),
            held: self.held.clone(),
            store: self.store.clone(),
            splits: self.splits,
            memory: Arc::default(),
        }
    }
}

impl CudaHybridState {
    /// An empty state of `batch` sequences, whose rows are as they come.
    ///
    /// # Errors
    /// No sequence; no memory left on the device.
    pub fn new(weights: Arc<CudaWeights>, batch: usize) -> Result<Self> {
        let rows = if weights.dtype == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 };
        Self::with_rows(weights, batch, rows)
    }

    /// The same whose salient tokens' rows are stored as `rows`: as they come, in int8 or in int4. The window's stay as they come.
    ///
    /// # Errors
    /// As [`new`](Self::new); a format without a kernel.
    pub fn with_rows(weights: Arc<CudaWeights>, batch: usize, rows: RowDtype) -> Result<Self> {
        support::check_row_dtype(rows, weights.dtype)?;
        support::check_router(rows, weights.config.router)?;
        if batch == 0 {
            return Err(AttentionError::Config("a state on CUDA has one sequence or more".into()));
        }
        let (device, d) = (&weights.device, weights.geometry.head_dim);
        let row_bytes = d * weights.dtype.size_in_bytes();
        let heads = batch * weights.heads();
        Ok(Self {
            positions: vec![0; batch],
            held: Sections::zeros(
                device,
                [
                    heads * RING * row_bytes,
                    heads * RING * row_bytes,
                    heads * RING * size_of::<f32>(),
                    heads * 2 * d * d * size_of::<f32>(),
                    heads * 2 * d * size_of::<f32>(),
                    heads * size_of::<u64>(),
                    heads * size_of::<u32>(),
                ],
            )?,
            store: Store::new(
                device,
                batch,
                &weights.host_budgets,
                Coding::new(rows, d, weights.dtype.size_in_bytes()),
                weights.config.cap,
                0,
            )?,
            splits: splits(heads, rows.is_coded()),
            memory: Arc::default(),
            weights,
        })
    }

    /// Feeds `T` tokens more to each sequence and returns their attention output, `[B, H, T, D]` of the rows' dtype.
    ///
    /// * `q` `[B, H, T, D]`, `k`, `v` `[B, K, T, D]`: of the rows' dtype, on the state's device.
    /// * `lengths`: valid tokens of each sequence (right padding is ignored; its output rows are 0); all `T` if absent.
    ///
    /// Where some sequence is fed several tokens, the kernels of [`crate::hybrid_attention`] read all at once, also onto what the
    /// sequences have, wherever in a chunk they are.
    ///
    /// # Errors
    /// Shapes that contradict the state; another dtype or device; no memory left on the device.
    pub fn advance(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let rows = AttentionRows { q, k, v, gate: None };
        self.advance_rows(rows, lengths, &PassScratch::default())
    }

    /// [`advance`](Self::advance) of rows that may have an output gate.
    fn advance_rows(
        &mut self,
        rows: AttentionRows<'_>,
        lengths: Option<&[usize]>,
        scratch: &PassScratch,
    ) -> Result<Tensor> {
        let fed = self.weights.fed(rows, self.positions.len())?;
        let (batch, tokens) = (self.positions.len(), fed.q.dim(2)?);
        let lengths = checked_lengths(OP, lengths, batch, tokens)?;
        let whole = lengths.iter().all(|&length| length == tokens);
        if lengths.iter().any(|&length| length > 1) {
            // Where rows are kept as codes, salient keys are what codes give back also within a whole sequence.
            let alone = whole && self.store.kind() == STILL_PLAIN;
            return match alone && self.positions.iter().all(|&position| position == 0) {
                true => self.read(&fed),
                false => self.read_onto(&fed, &lengths, scratch),
            };
        }
        let q = &fed.q;
        let out = match whole {
            // SAFETY: every row is some sequence's token, and written as such.
            true => unsafe { q.empty_like()? },
            false => Tensor::zeros(q.shape(), q.dtype(), q.device())?,
        };
        self.feed(&fed, &out, &lengths)?;
        Ok(out)
    }

    /// Queues one token of each sequence without looking at [`position`](Self::position): nothing is uploaded and no memory
    /// moves, so that the call can be captured in a CUDA graph and replayed. `rows` as in
    /// [`AttentionState::advance`] with `T = 1`; `positions` `[B]` u32 on the device, [`IDLE`] for a sequence that
    /// sits the step out, whose output is not written.
    ///
    /// The caller [counts](Self::count) the step.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    ///
    /// # Safety
    /// The positions are those of the sequences' next tokens whenever the step runs, and room for them was
    /// [made](Self::reserve) before.
    pub unsafe fn step(&self, rows: AttentionRows<'_>, positions: &Tensor) -> Result<Tensor> {
        // SAFETY: the caller's.
        unsafe { self.weights.step(self, rows, positions, None, &StepMemory::default()) }
    }

    pub(super) fn weights(&self) -> &Arc<CudaWeights> {
        &self.weights
    }

    /// How salient rows are kept, as the kernels name it.
    pub(super) fn coding(&self) -> i32 {
        self.store.kind()
    }

    /// Another one for every state.
    pub(super) fn memory(&self) -> &Arc<()> {
        &self.memory
    }

    /// Where the state of one sequence lies.
    pub(super) fn place(&self) -> candle_core::Result<SequenceState> {
        let CudaWeights { device, map_q, map_k, log_scale, .. } = &*self.weights;
        let stream = device.cuda_stream();
        let held = [map_q, map_k].map(Tensor::storage_and_layout);
        let held_scale = log_scale.as_ref().map(Tensor::storage_and_layout);
        let mut launch = Launch::new(&stream)?;
        let [map_q, map_k] = &held;
        let w_q: *mut c_void = launch.values(on_cuda(&map_q.0)?, map_q.1)?;
        let w_k: *mut c_void = launch.values(on_cuda(&map_k.0)?, map_k.1)?;
        let log_scale: *mut f32 = launch.optional_values(&held_scale)?;
        let args = self.args(&mut launch);
        Ok(SequenceState {
            w_q,
            w_k,
            log_scale,
            budgets: args.budgets,
            ring_k: args.ring_k,
            ring_v: args.ring_v,
            ring_score: args.ring_score,
            store: args.store,
            s: args.s,
            z: args.z,
        })
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.positions.len()
    }

    /// Copies the linear state of one sequence and selection head to the host (empty while nothing was absorbed).
    ///
    /// # Errors
    /// An error of the device.
    pub fn linear(&self, sequence: usize, head: usize) -> Result<LinearState> {
        let (device, d) = (&self.weights.device, self.weights.geometry.head_dim);
        let count = self.absorbed(self.positions[sequence], head);
        if count == 0 {
            return Ok(LinearState { s: Vec::new(), z: Vec::new(), count: 0 });
        }
        let at = (sequence * self.weights.heads() + head) * 2 * d;
        Ok(LinearState {
            s: self.held.read(device, S, at * d..(at + 2 * d) * d)?,
            z: self.held.read(device, Z, at..at + 2 * d)?,
            count,
        })
    }

    /// Tokens in a head's linear state after `position` tokens.
    fn absorbed(&self, position: usize, head: usize) -> usize {
        let CudaWeights { config, host_budgets, .. } = &*self.weights;
        let retired = retired(position);
        match config.branches.linear {
            true => retired * CHUNK - kept(config.cap, host_budgets[head], retired),
            false => 0,
        }
    }

    /// Reads whole sequences that have nothing yet, equally long.
    fn read(&mut self, fed: &Fed) -> Result<Tensor> {
        let Fed { q, k, v, gate } = fed;
        let tokens = q.dim(2)?;
        self.reserve(tokens)?;
        let weights = self.weights.clone();
        let device = &weights.device;
        let shape = shape(q, weights.heads(), flags(&weights.config))?;
        let routing =
            DeviceRouting::decide(device, &shape, [q, k, v], &weights.map_k, &weights.config)?;
        let operands = Operands {
            shape,
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            map_q: weights.map_q.clone(),
            map_k: weights.map_k.clone(),
            log_scale: weights.log_scale.clone(),
            gate: gate.clone(),
            routing,
        };
        let stream = device.cuda_stream();
        let mut launch = Launch::new(&stream)?;
        let last = Last { s: self.held.at(&mut launch, S), z: self.held.at(&mut launch, Z) };
        let (out, _) = forward(device, &operands, false, Some(last))?;
        drop(launch);
        self.fill(&operands)?;
        self.positions.fill(tokens);
        Ok(out)
    }

    /// Queues the copy of rings and salient rows of sequences that were read at once.
    fn fill(&self, operands: &Operands) -> candle_core::Result<()> {
        let Operands { shape, k, v, routing, .. } = operands;
        let stream = self.weights.device.cuda_stream();
        let held = [k, v].map(Tensor::storage_and_layout);
        let mut launch = Launch::new(&stream)?;
        let [k, v] = &held;
        let k = launch.rows(on_cuda(&k.0)?, k.1)?;
        let v = launch.rows(on_cuda(&v.0)?, v.1)?;
        let (score, routing) = (launch.at(routing.scores_on_device()), routing.args(&mut launch));
        let args = self.args(&mut launch);
        // SAFETY: the buffers are as large as still.h says for `shape`, there is room in the store, and all live until the launch
        // is dropped.
        let code =
            unsafe { still_decode_fill(shape, k, v, score, &routing, &args, launch.stream()) };
        check("still_decode_fill", code).map_err(candle_core::Error::wrap)
    }

    /// Feeds the first `lengths` tokens of each sequence one by one.
    fn feed(&mut self, fed: &Fed, out: &Tensor, lengths: &[usize]) -> Result<()> {
        let steps = lengths.iter().copied().max().unwrap_or(0);
        if steps == 0 {
            return Ok(());
        }
        let end = |(position, length): (&usize, &usize)| position + length;
        self.reserve(self.positions.iter().zip(lengths).map(end).max().unwrap_or(0))?;
        let position = |(b, &length): (usize, &usize), t: usize| match t < length {
            true => (self.positions[b] + t) as u32,
            false => IDLE,
        };
        let positions: Vec<u32> = (0..steps)
            .flat_map(|t| lengths.iter().enumerate().map(move |length| position(length, t)))
            .collect();
        let positions = Tensor::from_vec(positions, (steps, lengths.len()), out.device())?;
        let memory = StepMemory::default();
        for t in 0..steps {
            let (fed, out) = (fed.token(t)?, out.narrow(2, t, 1)?);
            self.weights.queue(self, &fed, &out, &positions.get(t)?, None, &memory)?;
        }
        for (position, length) in self.positions.iter_mut().zip(lengths) {
            *position += length;
        }
        Ok(())
    }
}

impl StepState for CudaHybridState {
    fn args<'a>(&'a self, launch: &mut Launch<'a>) -> Decode {
        let weights = &*self.weights;
        Decode {
            q: Rows::NONE,
            k: Rows::NONE,
            v: Rows::NONE,
            out: Rows::NONE,
            w_q: null_mut(),
            w_k: null_mut(),
            log_scale: null_mut(),
            budgets: launch.at(&weights.budgets),
            cap: weights.config.cap.map_or(NO_CAP, |cap| cap as i32),
            positions: null_mut(),
            ring_k: self.held.at(launch, RING_K),
            ring_v: self.held.at(launch, RING_V),
            ring_score: self.held.at(launch, RING_SCORE),
            store: self.store.there(launch),
            coding: self.store.kind(),
            key_scale: weights.key_scale(launch),
            admitted: self.held.at(launch, ADMITTED),
            s: self.held.at(launch, S),
            z: self.held.at(launch, Z),
            partial: null_mut(),
            arrived: self.held.at(launch, ARRIVED),
            splits: self.splits,
            gate: Rows::NONE,
            router: router(&weights.config),
            cos: null(),
            sin: null(),
            rotary: 0,
            states: null(),
        }
    }

    fn batch(&self) -> usize {
        self.positions.len()
    }

    fn splits(&self) -> i32 {
        self.splits
    }
}

impl GraphStep for CudaHybridState {
    unsafe fn step(
        &self,
        rows: AttentionRows<'_>,
        positions: &Tensor,
        rotation: Option<StepRotation<'_>>,
        memory: &StepMemory,
    ) -> Result<Tensor> {
        // SAFETY: the caller's.
        unsafe { self.weights.step(self, rows, positions, rotation, memory) }
    }

    fn rotates(&self, rotary: usize) -> bool {
        support::rotates(rotary)
    }

    /// A step looks up where the store lies.
    fn generation(&self) -> usize {
        0
    }
}

impl GraphState for CudaHybridState {
    fn moves(&self) -> usize {
        self.store.moves
    }

    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let held: Vec<usize> = self.positions.iter().map(|&position| retired(position)).collect();
        let CudaWeights { device, budgets, host_budgets, .. } = &*self.weights;
        Ok(self.store.reserve(device, (host_budgets, budgets), retired(tokens), &held)?)
    }

    fn count(&mut self) {
        self.positions.iter_mut().for_each(|position| *position += 1);
    }

    fn in_table(&self) -> TableState<'_> {
        TableState::Hybrid(self)
    }
}

impl AttentionState for CudaHybridState {
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor> {
        self.advance_rows(rows, lengths, &PassScratch::default())
    }

    fn advance_in(
        &mut self,
        rows: AttentionRows<'_>,
        lengths: Option<&[usize]>,
        scratch: &PassScratch,
    ) -> Result<Tensor> {
        self.advance_rows(rows, lengths, scratch)
    }

    fn kind(&self) -> AttentionKind {
        AttentionKind::Hybrid
    }

    fn location(&self) -> DeviceLocation {
        self.weights.map_q.device().location()
    }

    fn position(&self, sequence: usize) -> usize {
        self.positions[sequence]
    }

    fn size_bytes(&self) -> usize {
        // With the room that the store has to grow into.
        self.held.num_bytes() + self.store.size_bytes()
    }

    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()> {
        check_truncate(&self.weights.config, self.positions[sequence], tokens)
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        self.go_back(sequence, tokens)
    }

    fn save(&self) -> Result<SavedState> {
        self.saved()
    }

    fn restore(&mut self, saved: SavedState) -> Result<()> {
        self.restore_saved(saved)
    }

    fn boxed_clone(&self) -> Box<dyn AttentionState> {
        Box::new(self.clone())
    }

    fn in_graph(&mut self) -> Option<&mut dyn GraphState> {
        Some(self)
    }
}
