//! The recurrent state of hybrid attention: one layer, a batch of sequences.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{DeviceLocation, Tensor};
use rayon::prelude::*;

use crate::arguments::{advance_values, expect_shape, values};
use crate::attention_state::check_truncate;
use crate::config::{LinearNorm, logit_scale};
use crate::cpu::call::{Record, Scratch};
use crate::cpu::forward::advance;
use crate::cpu::head_input::{FeatureMaps, HeadInput, Routing, should_split_heads};
use crate::cpu::head_state::HeadState;
use crate::cpu::pieces::{attend_piece, pieces};
use crate::cpu::rows::Rows;
use crate::dense::DenseScratch;
use crate::weights::inverse_sigmoid;
use crate::{
    AttentionError, AttentionKind, AttentionRows, AttentionState, HeadGeometry, HostState,
    HybridConfig, HybridWeights, Mode, Result, RowDtype, SavedState, StateBytes, router,
};

const OP: &str = "HybridState::advance";

/// A layer's weights, folded and laid out for inference.
#[derive(Clone, Debug)]
pub struct PreparedWeights {
    geometry: HeadGeometry,
    config: HybridConfig,
    /// `[H, D, F]`, reflections folded in.
    map_q: Vec<f32>,
    /// `[S, D, F]`, reflections folded in.
    map_k: Vec<f32>,
    /// `exp(ℓ)`, `[H]`, with `LinearNorm::Mean`.
    lambda: Option<Vec<f32>>,
    /// `1 / sigmoid(w)`, `[H]`, with a window factor.
    against_window: Option<Vec<f32>>,
}

impl PreparedWeights {
    /// Folds Householder reflections into `W` and copies everything to contiguous f32.
    ///
    /// # Errors
    /// Shapes that do not fit the configuration.
    pub fn new(
        geometry: HeadGeometry,
        config: &HybridConfig,
        weights: &HybridWeights,
    ) -> Result<Arc<Self>> {
        config.validate(geometry)?;
        weights.check(geometry, config)?;
        let (map_q, map_k) = weights.folded()?;
        let lambda = match (&weights.log_lambda, config.linear_norm) {
            (Some(log_lambda), LinearNorm::Mean) => {
                let log_lambda = values::<f32>("PreparedWeights::new", "log_lambda", log_lambda)?;
                Some(log_lambda.into_iter().map(f32::exp).collect())
            }
            _ => None,
        };
        let against_window = match &weights.window_factor {
            Some(w) => {
                let w = values::<f32>("PreparedWeights::new", "window_factor", w)?;
                Some(w.into_iter().map(inverse_sigmoid).collect())
            }
            None => None,
        };
        Ok(Arc::new(Self {
            geometry,
            config: config.clone(),
            map_q: values("PreparedWeights::new", "feature_map_q", &map_q)?,
            map_k: values("PreparedWeights::new", "feature_map_k", &map_k)?,
            lambda,
            against_window,
        }))
    }
}

/// The state of hybrid attention of one layer: for each sequence and selection head the window's ring, the salient rows and the
/// linear state.
#[derive(Debug)]
pub struct HybridState {
    weights: Arc<PreparedWeights>,
    /// `[batch, selection heads]`; each is fed by one thread at a time.
    heads: Vec<RwLock<HeadState<f32>>>,
    batch: usize,
}

impl Clone for HybridState {
    fn clone(&self) -> Self {
        let heads = self.heads.iter().map(|head| RwLock::new(read(head).clone())).collect();
        Self { weights: self.weights.clone(), heads, batch: self.batch }
    }
}

/// New rows of one selection head and sequence, after RoPE.
#[derive(Clone, Copy, Debug)]
pub struct HeadRows<'a> {
    /// Of its query heads, `[query heads, T, D]`.
    pub q: &'a [f32],
    /// `[T, D]`.
    pub k: &'a [f32],
    /// `[T, D]`.
    pub v: &'a [f32],
    /// `[query heads, T, D]`, with the output gate.
    pub gate: Option<&'a [f32]>,
    /// For a single token: the results of all [`pieces`](HostState::pieces) of the part, in order, or none. `[pieces, query
    /// heads, D + 2]`.
    pub beforehand: &'a [f32],
}

/// The state of one selection head of one sequence, locked for the thread that feeds it.
#[derive(Debug)]
pub struct HybridHead<'a> {
    weights: &'a PreparedWeights,
    head: usize,
    state: RwLockWriteGuard<'a, HeadState<f32>>,
}

/// Scratch memory for feeding heads. Use one for each thread, so that upcast rows stay in its core's cache.
#[derive(Clone, Debug, Default)]
pub struct HeadScratch {
    pub(crate) hybrid: Scratch<f32>,
    pub(crate) dense: DenseScratch,
}

impl HybridHead<'_> {
    /// Feeds the first `length` rows and writes as many rows of each query head to `out`, `[query heads, T, D]`.
    ///
    /// `split` lets long inputs use several threads.
    ///
    /// # Panics
    /// If the slices are too short for their layout.
    pub fn feed(
        &mut self,
        rows: HeadRows<'_>,
        length: usize,
        split: bool,
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        let (weights, head) = (self.weights, self.head);
        let (config, d) = (&weights.config, weights.geometry.head_dim);
        let group =
            weights.geometry.num_heads / weights.geometry.selection_heads(config.selection_head);
        let tokens = rows.k.len() / d;
        let queries = head * group..(head + 1) * group;
        let map_size = d * config.feature_dim;
        let size = (tokens * d).max(1);
        let input = HeadInput {
            chunk: config.chunk,
            head_dim: d,
            layer: config.layer,
            mode: config.mode,
            logit_scale: logit_scale(config.logit_scale, d) as f32,
            head,
            router: config.router,
            branches: config.branches,
            routing: Routing::Scores {
                budget: router::effective_budget(config, head),
                cap: config.cap,
            },
            q: rows.q.chunks_exact(size).map(|q| Rows::new(q, d, d)).collect(),
            k: Rows::new(rows.k, d, d),
            v: Rows::new(rows.v, d, d),
            gate: rows
                .gate
                .map(|gate| gate.chunks_exact(size).map(|gate| Rows::new(gate, d, d)).collect()),
            features: FeatureMaps {
                map: config.feature_map,
                q: queries
                    .clone()
                    .map(|h| &weights.map_q[h * map_size..(h + 1) * map_size])
                    .collect(),
                k: &weights.map_k[head * map_size..(head + 1) * map_size],
                feature_dim: config.feature_dim,
            },
            lambda: weights.lambda.as_ref().map(|lambda| &lambda[queries.clone()]),
            against_window: weights.against_window.as_ref().map(|inverse| &inverse[queries]),
            split_heads: split,
            beforehand: rows.beforehand,
        };
        let record = Record::default();
        advance(&mut self.state, &input, length, out, tokens, record, &mut scratch.hybrid);
    }
}

/// The linear state of one sequence and selection head.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearState {
    /// `S`, `[2F, D]` row-major.
    pub s: Vec<f32>,
    /// `z`, `[2F]`.
    pub z: Vec<f32>,
    /// Tokens absorbed, `n`.
    pub count: usize,
}

impl HybridState {
    /// An empty state of `batch` sequences whose exact rows are stored as `rows`.
    pub fn new(weights: Arc<PreparedWeights>, batch: usize, rows: RowDtype) -> Self {
        let heads = weights.geometry.selection_heads(weights.config.selection_head);
        let (config, d) = (&weights.config, weights.geometry.head_dim);
        let head = |head: usize| {
            let exponents = config.key_exponents_of(weights.geometry, head);
            let by_channel = config.codes_keys_by_channel(d, head, rows);
            HeadState::new(config.ring_chunk(), d, rows, config.cap.is_some())
                .coding_keys(by_channel, exponents)
        };
        let heads = (0..batch * heads).map(|part| RwLock::new(head(part % heads))).collect();
        Self { weights, heads, batch }
    }

    /// Keeps the position of each salient token too, for [`salient_positions`](Self::salient_positions). A score and a position
    /// take 8 bytes, which a state without a cap otherwise saves. For an empty state.
    #[must_use]
    pub fn keeping_positions(self) -> Self {
        for head in &self.heads {
            write(head).ranks.get_or_insert_default();
        }
        self
    }

    /// Feeds `T` tokens more to each sequence and returns their attention output, `[B, H, T, D]` f32.
    ///
    /// * `q` `[B, H, T, D]`, `k`, `v` `[B, K, T, D]`, `gate` `[B, H, T, D]`: f32, CPU.
    /// * `lengths`: valid tokens of each sequence (right padding is ignored; its output rows are 0); all `T` if absent.
    ///
    /// Any split of a sequence into calls gives the same output and state.
    ///
    /// # Errors
    /// Shapes that do not fit the state; a dtype or device without a kernel.
    pub fn advance(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gate: Option<&Tensor>,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let weights = &self.weights;
        if weights.config.gate != gate.is_some() {
            return Err(AttentionError::Config(
                "the output gate's value is needed exactly when the gate is on".into(),
            ));
        }
        let gate = match gate {
            Some(gate) => {
                expect_shape(OP, "gate", gate, q.dims())?;
                Some(values::<f32>(OP, "gate", gate)?)
            }
            None => None,
        };
        let (geometry, batch) = (weights.geometry, self.batch);
        advance_values(OP, [q, k, v], geometry, batch, lengths, |qkv, lengths, out| {
            self.advance_values(qkv, gate.as_deref(), lengths, out);
        })
    }

    /// [`HybridState::advance`] on slices whose sizes it has checked. Rows of `out` beyond `lengths` stay as they are.
    fn advance_values(
        &self,
        [q, k, v]: [&[f32]; 3],
        gate: Option<&[f32]>,
        lengths: &[usize],
        out: &mut [f32],
    ) {
        let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = self.weights.geometry;
        let heads = self.heads.len() / self.batch.max(1);
        let group = num_heads / heads;
        let tokens = q.len() / (self.batch * num_heads * d).max(1);
        let block = group * tokens * d;
        let split = should_split_heads(self.heads.len());
        out.par_chunks_mut(block.max(1)).enumerate().for_each_init(
            HeadScratch::default,
            |scratch, (task, out)| {
                let (sequence, head) = (task / heads, task % heads);
                let kv = sequence * num_key_value_heads + head * num_key_value_heads / heads;
                let (queries, kv) = (task * block..(task + 1) * block, kv * tokens * d);
                let rows = HeadRows {
                    q: &q[queries.clone()],
                    k: &k[kv..kv + tokens * d],
                    v: &v[kv..kv + tokens * d],
                    gate: gate.map(|gate| &gate[queries]),
                    beforehand: &[],
                };
                self.head(task).feed(rows, lengths[sequence], split, scratch, out);
            },
        );
    }

    /// Locks one of the [`parts`](Self::parts).
    ///
    /// # Panics
    /// If there is no such part.
    pub fn head(&self, part: usize) -> HybridHead<'_> {
        let heads = self.heads.len() / self.batch.max(1);
        HybridHead { weights: &self.weights, head: part % heads, state: write(&self.heads[part]) }
    }

    /// The linear state of one sequence and selection head. It is empty until a token is absorbed.
    pub fn linear(&self, sequence: usize, head: usize) -> LinearState {
        let state = self.state(sequence, head);
        LinearState { s: state.s.clone(), z: state.z.clone(), count: state.count }
    }

    /// Positions of the salient tokens of one sequence and selection head, ascending. `None` for a state without a cap that does
    /// not [keep them](Self::keeping_positions).
    pub fn salient_positions(&self, sequence: usize, head: usize) -> Option<Vec<u32>> {
        let state = self.state(sequence, head);
        let mut positions: Vec<u32> =
            state.ranks.as_ref()?.iter().map(|&(_, position)| position).collect();
        positions.sort_unstable();
        Some(positions)
    }

    fn state(&self, sequence: usize, head: usize) -> RwLockReadGuard<'_, HeadState<f32>> {
        read(&self.heads[sequence * (self.heads.len() / self.batch) + head])
    }
}

impl AttentionState for HybridState {
    fn advance(&mut self, rows: AttentionRows<'_>, lengths: Option<&[usize]>) -> Result<Tensor> {
        self.advance(rows.q, rows.k, rows.v, rows.gate, lengths)
    }

    fn kind(&self) -> AttentionKind {
        AttentionKind::Hybrid
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    fn position(&self, sequence: usize) -> usize {
        self.state(sequence, 0).position
    }

    fn size_bytes(&self) -> usize {
        self.heads.iter().map(|head| read(head).bytes_by_part().total()).sum()
    }

    fn bytes_by_part(&self) -> Option<StateBytes> {
        Some(self.heads.iter().map(|head| read(head).bytes_by_part()).sum())
    }

    fn check_truncate(&self, sequence: usize, tokens: usize) -> Result<()> {
        check_truncate(&self.weights.config, self.position(sequence), tokens)
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        self.check_truncate(sequence, tokens)?;
        let heads = self.heads.len() / self.batch;
        for head in &self.heads[sequence * heads..(sequence + 1) * heads] {
            match tokens {
                0 => write(head).clear(),
                _ => write(head).position = tokens,
            }
        }
        Ok(())
    }

    fn save(&self) -> Result<SavedState> {
        let mut saved = SavedState::default();
        for (part, head) in self.heads.iter().enumerate() {
            read(head).save(&mut saved, part)?;
        }
        Ok(saved)
    }

    fn restore(&mut self, mut saved: SavedState) -> Result<()> {
        let config = &self.weights.config;
        let mut position = None;
        for (part, head) in self.heads.iter().enumerate() {
            let mut head = write(head);
            head.restore(&mut saved, part, 2 * config.feature_dim)?;
            // Heads of a sequence have read equally many.
            let first = part % (self.heads.len() / self.batch) == 0;
            if !first && position != Some(head.position) {
                return Err(AttentionError::Config(format!(
                    "a saved state's part {part} has read {} tokens, and the one before it not",
                    head.position
                )));
            }
            position = Some(head.position);
        }
        saved.check_all_taken()
    }

    fn boxed_clone(&self) -> Box<dyn AttentionState> {
        Box::new(self.clone())
    }

    fn on_host(&self) -> Option<&dyn HostState> {
        Some(self)
    }
}

impl HostState for HybridState {
    fn parts(&self) -> usize {
        self.heads.len()
    }

    fn pieces(&self, part: usize) -> usize {
        let config = &self.weights.config;
        let wanted = config.mode == Mode::Hybrid && config.branches.salient;
        if wanted { pieces(&read(&self.heads[part]), config.chunk) } else { 0 }
    }

    fn attend_piece(
        &self,
        part: usize,
        piece: usize,
        q: &[f32],
        scratch: &mut HeadScratch,
        to: &mut [f32],
    ) {
        let scale = logit_scale(self.weights.config.logit_scale, self.weights.geometry.head_dim);
        attend_piece(&read(&self.heads[part]), piece, (q, scale as f32), &mut scratch.hybrid, to);
    }

    fn decode(&self, part: usize, rows: HeadRows<'_>, scratch: &mut HeadScratch, out: &mut [f32]) {
        self.head(part).feed(rows, 1, false, scratch, out);
    }
}

fn read<T>(head: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    head.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(head: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    head.write().unwrap_or_else(PoisonError::into_inner)
}
