//! One decode step on plain slices, by all threads together: no tensors, no graph, no memory that the step before did
//! not have.
//!
//! The same arithmetic as [`Model::forward`](crate::Model::forward) with several tokens, where a head's rows need
//! transposing.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use smallvec::SmallVec;
use still_attention::{AttentionState, HeadRows, HeadScratch, HostState};
use still_compute::rows::{self, Rows};
use still_compute::threads::{Shared, Worker, on_all_threads};
use still_quant::{LANES, PreparedRows};

use super::updates::{Update, Updates};
use crate::cache::{Cache, Workspace};
use crate::config::Activation;
use crate::decoder::ops::with_values;
use crate::decoder::{
    AttentionInputs, LayerOps, Linear, Norm, Projected, Projection, Role, RopeBase, Rotation,
    Weight,
};
use crate::error::{ModelError, Result};
use crate::model::Model;

/// Shares of a phase's tiles that a thread takes, so that a faster one can take more.
const SHARES: usize = 6;

/// Activations of a step, kept from one to the next.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    rotation: Rotation,
    updates: Updates,
    /// A row of packed embeddings is unpacked here.
    tile: Vec<f32>,
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    attention: Vec<f32>,
    hidden: Vec<f32>,
    /// What is normed before it is added to `x`.
    branch: Vec<f32>,
    /// What threads attend to in pieces, of all layers.
    pieces: Vec<Piece>,
    /// Where each layer's pieces end.
    ends: Vec<usize>,
    /// What a layer's pieces give, each `[query heads, D + 2]`.
    beforehand: Vec<f32>,
    /// Final-normed hidden states of the last step, `[B, E]`.
    pub normed: Vec<f32>,
    /// One per thread.
    workers: Vec<Mutex<WorkerBuffers>>,
}

/// See [`HostState::pieces`].
#[derive(Clone, Copy, Debug)]
struct Piece {
    part: usize,
    index: usize,
}

/// What every thread sees.
struct Step<'a> {
    rotation: &'a Rotation,
    updates: &'a Updates,
    batch: usize,
    x: Shared<'a>,
    q: Shared<'a>,
    k: Shared<'a>,
    v: Shared<'a>,
    gate: Shared<'a>,
    attention: Shared<'a>,
    hidden: Shared<'a>,
    branch: Shared<'a>,
    beforehand: Shared<'a>,
    logits: Shared<'a>,
    /// Each of a layer's parts is taken by one thread of a phase.
    layers: &'a [LayerStates<'a>],
    pieces: &'a [Piece],
    ends: &'a [usize],
}

/// Buffers of one thread, which no other reads or writes.
#[derive(Clone, Debug, Default)]
struct WorkerBuffers {
    normed: Vec<f32>,
    prepared: Vec<Prepared>,
    rows: PreparedRows,
    other_rows: PreparedRows,
    tiles: Vec<f32>,
    other_tiles: Vec<f32>,
    head_normed: Vec<f32>,
    rotated: Vec<f32>,
    gate: Vec<f32>,
    scratch: HeadScratch,
}

/// What a projection's tiles have in common.
#[derive(Clone, Debug, Default)]
struct Prepared {
    /// In the phase's count.
    first_tile: usize,
    /// See [`Weight::prepare`].
    rows: PreparedRows,
    /// The product whose rows these are: the first that prepares alike.
    rows_of: usize,
    /// See [`Update::low_into`].
    low: Vec<f32>,
}

/// A layer's states of all sequences.
enum LayerStates<'a> {
    /// In one cache.
    One(&'a dyn HostState),
    /// In a cache each. The parts are those of the first state, then those of the next, equally many.
    Each(Vec<&'a dyn HostState>),
}

impl<'a> LayerStates<'a> {
    fn one(layer: &'a dyn AttentionState) -> Result<Self> {
        Ok(Self::One(layer.on_host().ok_or_else(elsewhere)?))
    }

    fn each(layers: impl Iterator<Item = &'a dyn AttentionState>) -> Result<Self> {
        let states = layers.map(|layer| layer.on_host().ok_or_else(elsewhere));
        Ok(Self::Each(states.collect::<Result<_>>()?))
    }

    fn parts(&self) -> usize {
        match self {
            Self::One(state) => state.parts(),
            Self::Each(states) => states.iter().map(|state| state.parts()).sum(),
        }
    }

    /// The state that has a part, and the part's number there.
    fn of(&self, part: usize) -> (&'a dyn HostState, usize) {
        match self {
            Self::One(state) => (*state, part),
            Self::Each(states) => {
                let parts = states[0].parts();
                (states[part / parts], part % parts)
            }
        }
    }
}

/// Feeds one token, `ids`, to each sequence of a cache; leaves its final-normed hidden states in the buffers and, if they are
/// wanted, the logits after them in the cache.
pub(super) fn step(
    model: &Model,
    ids: &[u32],
    cache: &mut Cache,
    wants_logits: bool,
) -> Result<()> {
    let positions: Vec<usize> = (0..ids.len()).map(|sequence| cache.position(sequence)).collect();
    let Cache { layers, logits, scratch, .. } = cache;
    let layers = layers.iter().map(|layer| LayerStates::one(&**layer));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    run(model, ids, positions, &layers, &mut scratch.step, logits, wants_logits)
}

/// Feeds one token, `ids`, to each of several sequences that have a cache of their own; the logits after them are in the
/// workspace.
pub(super) fn step_of_many(
    model: &Model,
    ids: &[u32],
    caches: &[&mut Cache],
    workspace: &mut Workspace,
) -> Result<()> {
    let positions: Vec<usize> = caches.iter().map(|cache| cache.position(0)).collect();
    let layers = (0..model.decoder.layers.len())
        .map(|n| LayerStates::each(caches.iter().map(|cache| &*cache.layers[n])));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let Workspace { logits, scratch, .. } = workspace;
    run(model, ids, positions, &layers, &mut scratch.step, logits, true)
}

/// [`step`] of sequences at these positions, with these states by layer.
fn run(
    model: &Model,
    ids: &[u32],
    positions: Vec<usize>,
    layers: &[LayerStates<'_>],
    buffers: &mut Buffers,
    logits: &mut Vec<f32>,
    wants_logits: bool,
) -> Result<()> {
    let (decoder, student) = (&*model.decoder, model.student.as_ref());
    decoder.check_ids(ids)?;
    let config = &decoder.config;
    let batch = ids.len();
    let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
    let (queries, keys) = (batch * queries * config.head_dim, batch * keys * config.head_dim);
    let Buffers {
        rotation,
        updates,
        tile,
        x,
        q,
        k,
        v,
        gate,
        attention,
        hidden,
        branch,
        pieces,
        ends,
        beforehand,
        normed,
        workers,
    } = buffers;
    updates.prepare(student)?;
    decoder.set_positions(rotation, positions.into_iter());
    let x = take(x, batch * config.hidden_size);
    for (&id, x) in ids.iter().zip(x.chunks_exact_mut(config.hidden_size)) {
        decoder.embed_row(id, tile, x)?;
    }
    workers.resize_with(workers.len().max(rayon::current_num_threads()), Mutex::default);
    let most_beforehand = plan_pieces(layers, (queries, config.head_dim), pieces, ends);
    let shared = |buffer, length| Shared::new(take(buffer, length));
    let step = Step {
        rotation,
        updates,
        batch,
        x: Shared::new(x),
        q: shared(q, queries),
        k: shared(k, keys),
        v: shared(v, keys),
        gate: shared(gate, queries),
        attention: shared(attention, queries),
        hidden: shared(hidden, batch * config.intermediate_size),
        branch: shared(branch, batch * config.hidden_size),
        beforehand: shared(beforehand, most_beforehand),
        logits: shared(logits, if wants_logits { batch * config.vocab_size } else { 0 }),
        layers,
        pieces,
        ends,
    };
    on_all_threads(|worker| {
        let mut buffers = workers[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        let mut ops =
            SliceOps { step: &step, worker, buffers: &mut buffers, head_dim: config.head_dim };
        ops.all_layers(model)?;
        if wants_logits {
            let head = Tiled::of(&decoder.lm_head, &step.logits);
            let norm = Norm { weight: &decoder.norm.scale, eps: config.rms_norm_eps };
            ops.products((Slot::X, Some(norm)), &[head])?;
        }
        Ok::<_, ModelError>(())
    })?;
    let normed = take(normed, x.len());
    with_values(&decoder.norm.scale, |weight| {
        Rows::rms_norm(x, weight, config.rms_norm_eps, normed)
    })?;
    Ok(())
}

/// `length` values, whatever they are: each is written before it is read.
fn take(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, f32::NAN);
    buffer
}

/// A buffer of the step.
#[derive(Clone, Copy, Debug)]
enum Slot {
    X,
    Q,
    K,
    V,
    Gate,
    Attention,
    Hidden,
    Branch,
}

/// A buffer's rows, perhaps still to be normed: every thread norms them for itself.
type Input<'w> = (Slot, Option<Norm<'w>>);

/// Rows by head, normed and rotated where a head's attention is computed.
#[derive(Clone, Copy, Debug)]
struct Heads<'w> {
    slot: Slot,
    norm: Option<Norm<'w>>,
    rope: Option<RopeBase>,
}

/// A product that is shared out by tiles of its rows.
#[derive(Clone, Copy)]
struct Tiled<'a> {
    weight: &'a Weight,
    bias: Option<&'a Tensor>,
    update: Option<Update<'a>>,
    /// `[B, rows]`
    to: &'a Shared<'a>,
    /// Whether to add to what is there.
    add: bool,
}

impl<'a> Tiled<'a> {
    fn new(step: &'a Step<'_>, projection: &'a Projection<'_>, to: Slot) -> Result<Self> {
        let Projection { linear, lora, .. } = projection;
        let update = lora.map(|lora| step.updates.of(lora).ok_or_else(unprepared)).transpose()?;
        let (bias, to) = (linear.bias.as_ref(), step.slot(to));
        Ok(Self { bias, update, ..Self::of(&linear.weight, to) })
    }

    /// The matrix alone.
    fn of(weight: &'a Weight, to: &'a Shared<'a>) -> Self {
        Self { weight, bias: None, update: None, to, add: false }
    }

    /// Enters the products of some tiles, `[tiles, B, 16]`, in place of what was there or in addition.
    ///
    /// # Safety
    /// Nobody else has these rows of `to` in this phase.
    unsafe fn enter(&self, tiles: Range<usize>, values: &[f32]) -> Result<()> {
        let to = (self.to, self.weight.dims2()?.0);
        let enter = |bias: Option<&[f32]>| {
            // SAFETY: by this function's own contract.
            unsafe { rows::enter_tiles(tiles, values, bias, self.add, to) }
        };
        match self.bias {
            Some(bias) => with_values(bias, |bias| enter(Some(bias)))?,
            None => enter(None),
        }
        Ok(())
    }
}

impl Step<'_> {
    fn pieces(&self, layer: usize) -> &[Piece] {
        let start = layer.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.pieces[start..self.ends[layer]]
    }

    fn slot(&self, slot: Slot) -> &Shared<'_> {
        match slot {
            Slot::X => &self.x,
            Slot::Q => &self.q,
            Slot::K => &self.k,
            Slot::V => &self.v,
            Slot::Gate => &self.gate,
            Slot::Attention => &self.attention,
            Slot::Hidden => &self.hidden,
            Slot::Branch => &self.branch,
        }
    }

    /// The values of an input, `[B, width]`.
    ///
    /// # Safety
    /// Nobody writes the buffer while the values are read.
    unsafe fn read<'a>(
        &'a self,
        (slot, norm): Input<'_>,
        normed: &'a mut Vec<f32>,
    ) -> Result<&'a [f32]> {
        // SAFETY: by this function's own contract.
        let x = unsafe { self.slot(slot).read() };
        let Some(Norm { weight, eps }) = norm else { return Ok(x) };
        let normed = take(normed, x.len());
        with_values(weight, |weight| Rows::rms_norm(x, weight, eps, normed))?;
        Ok(normed)
    }
}

/// A layer as one of the threads computes it.
struct SliceOps<'s> {
    step: &'s Step<'s>,
    worker: &'s Worker<'s>,
    buffers: &'s mut WorkerBuffers,
    head_dim: usize,
}

impl<'w> LayerOps<'w> for SliceOps<'_> {
    type Rows = Slot;
    type Input = Input<'w>;
    type Heads = Heads<'w>;

    fn norm(&mut self, x: &Slot, norm: Norm<'w>) -> Result<Input<'w>> {
        Ok((*x, Some(norm)))
    }

    fn input(&mut self, x: &Slot) -> Input<'w> {
        (*x, None)
    }

    fn project(
        &mut self,
        x: &Input<'w>,
        projections: &[Projection<'w>],
    ) -> Result<Projected<Slot>> {
        let (mut slots, mut tiled) = (Projected::new(), SmallVec::<[_; 4]>::new());
        for projection in projections {
            let slot = match projection.role {
                Role::Query => Slot::Q,
                Role::Key => Slot::K,
                Role::Value => Slot::V,
                Role::OutputGate => Slot::Gate,
                other => {
                    return Err(ModelError::Invalid(format!("a step has no rows for {other:?}")));
                }
            };
            slots.push(slot);
            tiled.push(Tiled::new(self.step, projection, slot)?);
        }
        self.products(*x, &tiled)?;
        Ok(slots)
    }

    fn project_onto(
        &mut self,
        onto: Slot,
        x: &Input<'w>,
        projection: Projection<'w>,
        norm: Option<Norm<'w>>,
    ) -> Result<Slot> {
        let Some(norm) = norm else {
            let tiled = Tiled::new(self.step, &projection, onto)?;
            self.products(*x, &[Tiled { add: true, ..tiled }])?;
            return Ok(onto);
        };
        self.products(*x, &[Tiled::new(self.step, &projection, Slot::Branch)?])?;
        self.add_normed(onto, norm)?;
        Ok(onto)
    }

    fn gated(
        &mut self,
        x: &Input<'w>,
        gate: Projection<'w>,
        up: Projection<'w>,
        activation: Activation,
    ) -> Result<Input<'w>> {
        let Self { step, worker, buffers, .. } = self;
        let (gate_weight, up_weight) = (&gate.linear.weight, &up.linear.weight);
        let (rows, _) = gate_weight.dims2()?;
        let hidden = Tiled::of(gate_weight, &step.hidden);
        if let Some(work) = worker.phase(rows.div_ceil(LANES), SHARES)? {
            let WorkerBuffers { normed, rows, other_rows, tiles, other_tiles, .. } = &mut **buffers;
            // SAFETY: the phase that wrote `x` is over, this one goes on.
            let x = unsafe { step.read(*x, normed) }?;
            gate_weight.prepare(x, rows);
            let other_rows = match up_weight.prepares_like(gate_weight) {
                true => &*rows,
                false => {
                    up_weight.prepare(x, other_rows);
                    &*other_rows
                }
            };
            for part in work {
                let wide_gate = take(tiles, part.len() * step.batch * LANES);
                let wide_up = take(other_tiles, wide_gate.len());
                gate_weight.multiply_tiles(part.clone(), x, rows, wide_gate)?;
                up_weight.multiply_tiles(part.clone(), x, other_rows, wide_up)?;
                add_bias(&gate.linear, part.start, step.batch, wide_gate)?;
                add_bias(&up.linear, part.start, step.batch, wide_up)?;
                rows::activate(activation, wide_gate, wide_up);
                // SAFETY: shares are disjoint.
                unsafe { hidden.enter(part, wide_gate) }?;
            }
        }
        Ok((Slot::Hidden, None))
    }

    fn heads(
        &mut self,
        slot: Slot,
        norm: Option<Norm<'w>>,
        rope: Option<RopeBase>,
    ) -> Result<Heads<'w>> {
        Ok(Heads { slot, norm, rope })
    }

    fn output_gate(&mut self, slot: Slot) -> Result<Heads<'w>> {
        Ok(Heads { slot, norm: None, rope: None })
    }
}

impl SliceOps<'_> {
    /// Sends `x` through all layers.
    fn all_layers(&mut self, model: &Model) -> Result<()> {
        let student = model.student.as_ref();
        for (n, layer) in model.decoder.layers.iter().enumerate() {
            let student = student.and_then(|student| student.layer(n));
            let inputs = layer.before_attention(self, &Slot::X, student)?;
            self.attend(&inputs, n)?;
            layer.after_attention(self, Slot::X, &Slot::Attention, student)?;
        }
        Ok(())
    }

    /// One phase: products of the same `x` `[B, in]`.
    fn products(&mut self, x: Input<'_>, products: &[Tiled<'_>]) -> Result<()> {
        let Self { step, worker, buffers, .. } = self;
        let mut total = 0;
        for product in products {
            total += product.weight.tiles()?;
        }
        let Some(work) = worker.phase(total, SHARES)? else { return Ok(()) };
        let WorkerBuffers { normed, prepared, tiles: values, .. } = &mut **buffers;
        // SAFETY: the phases that wrote the inputs are over, and this one goes on while `x` is used.
        let x = unsafe { step.read(x, normed) }?;
        prepared.resize_with(prepared.len().max(products.len()), Prepared::default);
        let mut first_tile = 0;
        for (n, product) in products.iter().enumerate() {
            let like = |first: &Tiled<'_>| product.weight.prepares_like(first.weight);
            let rows_of = products[..n].iter().position(like).unwrap_or(n);
            let prepared = &mut prepared[n];
            (prepared.first_tile, prepared.rows_of) = (first_tile, rows_of);
            first_tile += product.weight.tiles()?;
            if rows_of == n {
                product.weight.prepare(x, &mut prepared.rows);
            }
            if let Some(update) = product.update {
                update.low_into(x, step.batch, &mut prepared.low);
            }
        }
        let all = &*prepared;
        for part in work {
            for (product, prepared) in products.iter().zip(all) {
                let (first, tiles) = (prepared.first_tile, product.weight.tiles()?);
                let part = part.start.clamp(first, first + tiles) - first
                    ..part.end.clamp(first, first + tiles) - first;
                if part.is_empty() {
                    continue;
                }
                let values = take(values, part.len() * step.batch * LANES);
                let rows = &all[prepared.rows_of].rows;
                product.weight.multiply_tiles(part.clone(), x, rows, values)?;
                if let Some(update) = product.update {
                    update.add(part.clone(), &prepared.low, step.batch, values);
                }
                // SAFETY: shares are disjoint.
                unsafe { product.enter(part, values) }?;
            }
        }
        Ok(())
    }

    /// One phase: [`Slot::Branch`] through a norm, added to another buffer.
    fn add_normed(&mut self, onto: Slot, Norm { weight, eps }: Norm<'_>) -> Result<()> {
        let Self { step, worker, buffers, .. } = self;
        let batch = step.batch;
        for sequence in worker.phase(batch, batch)?.into_iter().flatten().flatten() {
            // SAFETY: the phase that wrote it is over.
            let branch = unsafe { step.branch.read() };
            let width = branch.len() / batch;
            let rows = sequence * width..(sequence + 1) * width;
            let normed = take(&mut buffers.normed, width);
            with_values(weight, |w| Rows::rms_norm(&branch[rows.clone()], w, eps, normed))?;
            // SAFETY: every sequence has its own rows.
            let onto = unsafe { step.slot(onto).write(rows) };
            Rows::add_row(onto, normed);
        }
        Ok(())
    }

    /// A layer's attention, into [`Slot::Attention`]: one phase, and one before it where there are pieces.
    fn attend(&mut self, inputs: &AttentionInputs<Heads<'_>>, layer: usize) -> Result<()> {
        let (step, worker) = (self.step, self.worker);
        let (states, pieces) = (&step.layers[layer], step.pieces(layer));
        let units = states.parts();
        if !pieces.is_empty() {
            for n in worker.phase(pieces.len(), pieces.len())?.into_iter().flatten().flatten() {
                let Piece { part, index } = pieces[n];
                let queries = self.rotate(part, units, inputs)?.len();
                let q = &self.buffers.rotated[..queries];
                let size = queries + queries / self.head_dim * 2;
                // SAFETY: every piece has its own part, and what read those of the layer before is over.
                let to = unsafe { step.beforehand.write(n * size..(n + 1) * size) };
                let (state, part) = states.of(part);
                state.attend_piece(part, index, q, &mut self.buffers.scratch, to);
            }
        }
        for unit in worker.phase(units, units)?.into_iter().flatten().flatten() {
            self.attend_unit(unit, units, inputs, layer)?;
        }
        Ok(())
    }

    /// Norms and rotation of one head of one sequence: queries and key into the buffer. Where its queries lie among all.
    fn rotate(
        &mut self,
        unit: usize,
        units: usize,
        inputs: &AttentionInputs<Heads<'_>>,
    ) -> Result<Range<usize>> {
        let Self { step, buffers, head_dim: d, .. } = self;
        let d = *d;
        let AttentionInputs { q, k, .. } = inputs;
        // SAFETY: the phase that wrote them is over.
        let read = |heads: &Heads<'_>| unsafe { step.slot(heads.slot).read() };
        let (q_rows, k_rows) = (read(q), read(k));
        let queries = unit * (q_rows.len() / units)..(unit + 1) * (q_rows.len() / units);
        let kv = kv_row(unit, units, k_rows.len() / d) * d;
        let sequence = unit * step.batch / units;
        let rotated = take(&mut buffers.rotated, queries.len() + d);
        let (to_q, to_k) = rotated.split_at_mut(queries.len());
        for (rows, heads, to) in
            [(&q_rows[queries.clone()], q, to_q), (&k_rows[kv..kv + d], k, to_k)]
        {
            let rows = match heads.norm {
                Some(Norm { weight, eps }) => {
                    let normed = take(&mut buffers.head_normed, rows.len());
                    with_values(weight, |w| Rows::rms_norm(rows, w, eps, normed))?;
                    &*normed
                }
                None => rows,
            };
            let rotation = heads.rope.map(|base| step.rotation.of(base)).transpose()?;
            match rotation {
                Some(rotation) => Rows::rotate(rows, d, rotation.angles().of(sequence, 0), to),
                None => to.copy_from_slice(rows),
            }
        }
        Ok(queries)
    }

    /// One head of one sequence.
    fn attend_unit(
        &mut self,
        unit: usize,
        units: usize,
        inputs: &AttentionInputs<Heads<'_>>,
        layer: usize,
    ) -> Result<()> {
        let queries = self.rotate(unit, units, inputs)?;
        let Self { step, buffers, head_dim: d, .. } = self;
        let d = *d;
        let AttentionInputs { v, gate, .. } = inputs;
        // SAFETY: the phase that wrote them is over.
        let read = |heads: &Heads<'_>| unsafe { step.slot(heads.slot).read() };
        let v_rows = read(v);
        let (q, k) = buffers.rotated[..queries.len() + d].split_at(queries.len());
        let kv = kv_row(unit, units, v_rows.len() / d) * d;
        let v = &v_rows[kv..kv + d];
        // They are in order of their parts.
        let pieces = step.pieces(layer);
        let first = pieces.partition_point(|piece| piece.part < unit);
        let size = queries.len() + queries.len() / d * 2;
        let end = first + pieces[first..].partition_point(|piece| piece.part == unit);
        // SAFETY: the phase that wrote them is over.
        let beforehand = unsafe { &step.beforehand.read()[first * size..end * size] };
        let gate = gate.as_ref().map(|gate| {
            let to = take(&mut buffers.gate, queries.len());
            rows::sigmoid(&read(gate)[queries.clone()], to);
            &*to
        });
        // SAFETY: every head has its own part.
        let out = unsafe { step.attention.write(queries) };
        let rows = HeadRows { q, k, v, gate, beforehand };
        let (state, part) = step.layers[layer].of(unit);
        state.decode(part, rows, &mut buffers.scratch, out);
        Ok(())
    }
}

/// Lists the pieces of all layers. The most values that those of one layer give, where a step has `queries` values of queries in
/// heads of `d`.
fn plan_pieces(
    layers: &[LayerStates<'_>],
    (queries, d): (usize, usize),
    pieces: &mut Vec<Piece>,
    ends: &mut Vec<usize>,
) -> usize {
    pieces.clear();
    ends.clear();
    let mut most = 0;
    for states in layers {
        let (start, parts) = (pieces.len(), states.parts());
        for part in 0..parts {
            let (state, own) = states.of(part);
            pieces.extend((0..state.pieces(own)).map(|index| Piece { part, index }));
        }
        ends.push(pieces.len());
        let queries = queries / parts.max(1);
        most = most.max((pieces.len() - start) * (queries + queries / d * 2));
    }
    most
}

/// Which of the `rows` keys belongs to a unit: selection heads may share a KV head.
fn kv_row(unit: usize, units: usize, rows: usize) -> usize {
    unit * rows / units
}

fn unprepared() -> ModelError {
    ModelError::Invalid("a decode step met a low-rank update that is not the student's".into())
}

fn elsewhere() -> ModelError {
    ModelError::Invalid("a decode step on the CPU was given a state elsewhere".into())
}

/// Adds a projection's bias, if it has one, to its products in tiles from tile `first` on, `[tiles, B, 16]`.
fn add_bias(linear: &Linear, first: usize, batch: usize, tiles: &mut [f32]) -> Result<()> {
    let Some(bias) = &linear.bias else { return Ok(()) };
    with_values(bias, |bias| rows::add_bias(bias, first, batch, tiles))?;
    Ok(())
}
