//! One decode step on plain slices, by all threads together: no tensors, no graph, no memory that the step before did
//! not have.
//!
//! The same arithmetic as [`Model::forward`](crate::Model::forward) with several tokens, where a head's rows need
//! transposing.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use smallvec::SmallVec;
use still_attention::{HeadRows, HeadScratch};
use still_compute::vector::{dot, vectorize};
use still_quant::LANES;

use crate::decoder::ops::{rms_norm_rows, sigmoid, silu, with_values};
use crate::decoder::{Decoder, DecoderLayer, Linear, Lora, LoraLayer, Rotation, Weight};
use crate::error::{ModelError, Result};
use crate::model::{Cache, LayerCache};
use crate::student::{Student, StudentLayer};
use still_compute::threads::{Shared, Worker, on_all_threads};

/// Shares of a phase's tiles that a thread takes, so that a faster one can take more.
const SHARES: usize = 6;

/// Activations of a step, kept from one to the next.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    rotation: Rotation,
    /// A row of packed embeddings is unpacked here.
    tile: Vec<f32>,
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    attention: Vec<f32>,
    hidden: Vec<f32>,
    /// Final-normed hidden states of the last step, `[B, E]`.
    pub normed: Vec<f32>,
    /// Logits of the last step that was asked for them, `[B, vocab]`.
    pub logits: Vec<f32>,
    /// The step as a GPU replays it.
    #[cfg(feature = "cuda")]
    pub graph: Option<crate::cuda::StepGraph>,
    /// By worker.
    own: Vec<Mutex<Own>>,
}

/// A copy of a cache takes its own memory as it needs it.
impl Clone for Buffers {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// What every thread sees.
struct Step<'a> {
    rotation: &'a Rotation,
    batch: usize,
    x: Shared<'a>,
    q: Shared<'a>,
    k: Shared<'a>,
    v: Shared<'a>,
    gate: Shared<'a>,
    attention: Shared<'a>,
    hidden: Shared<'a>,
    logits: Shared<'a>,
    /// Each of a layer's parts is taken by one thread of a phase.
    layers: &'a [LayerCache],
}

/// What a thread keeps to itself.
#[derive(Clone, Debug, Default)]
struct Own {
    normed: Vec<f32>,
    prepared: Vec<Prepared>,
    sums: Vec<f32>,
    other_sums: Vec<f32>,
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
    /// See [`Weight::group_sums_into`].
    sums: Vec<f32>,
    /// See [`update_input`].
    low: Vec<f32>,
}

/// Feeds one token, `ids`, to each sequence; leaves its final-normed hidden states and, if they are wanted, the logits
/// after them in the cache's buffers.
pub(crate) fn step(
    decoder: &Decoder,
    student: Option<&Student>,
    ids: &[u32],
    cache: &mut Cache,
    wants_logits: bool,
) -> Result<()> {
    let config = &decoder.config;
    let batch = ids.len();
    let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
    let (queries, keys) = (batch * queries * config.head_dim, batch * keys * config.head_dim);
    let Cache { layers, buffers, .. } = cache;
    let Buffers {
        rotation, tile, x, q, k, v, gate, attention, hidden, normed, logits, own, ..
    } = buffers;
    let position = |sequence| layers.first().map_or(0, |layer| layer.position(sequence));
    decoder.turn(rotation, (0..batch).map(position));
    let x = take(x, batch * config.hidden_size);
    for (&id, x) in ids.iter().zip(x.chunks_exact_mut(config.hidden_size)) {
        decoder.embed_tokens.row_into(id as usize, tile, x)?;
    }
    own.resize_with(own.len().max(rayon::current_num_threads()), Mutex::default);
    let shared = |buffer, length| Shared::new(take(buffer, length));
    let step = Step {
        rotation,
        batch,
        x: Shared::new(x),
        q: shared(q, queries),
        k: shared(k, keys),
        v: shared(v, keys),
        gate: shared(gate, queries),
        attention: shared(attention, queries),
        hidden: shared(hidden, batch * config.intermediate_size),
        logits: shared(logits, if wants_logits { batch * config.vocab_size } else { 0 }),
        layers,
    };
    on_all_threads(|worker| {
        let mut own = own[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        for (n, layer) in decoder.layers.iter().enumerate() {
            let student = student.map(|student| &student.layers[n]);
            step.attention(worker, &mut own, layer, student, &step.layers[n])?;
            step.mlp(worker, &mut own, layer)?;
        }
        if wants_logits {
            let head = Projection::of(&decoder.lm_head, &step.logits);
            let normed = Input::Normed(&decoder.norm, config.rms_norm_eps);
            step.project(worker, &mut own, normed, &[head])?;
        }
        Ok::<_, ModelError>(())
    })?;
    let normed = take(normed, x.len());
    with_values(&decoder.norm, |weight| rms_norm_rows(x, weight, config.rms_norm_eps, normed))?;
    Ok(())
}

/// `length` values, whatever they are: each is written before it is read.
fn take(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, f32::NAN);
    buffer
}

/// What projections take.
#[derive(Clone, Copy)]
enum Input<'a> {
    /// `x`, normed with this weight and epsilon.
    Normed(&'a Tensor, f64),
    /// What an earlier phase wrote.
    Of(&'a Shared<'a>),
}

/// A product that is shared out by tiles of its rows.
#[derive(Clone, Copy)]
struct Projection<'a> {
    weight: &'a Weight,
    bias: Option<&'a Tensor>,
    lora: Option<&'a Lora>,
    /// `[B, rows]`
    to: &'a Shared<'a>,
    /// Whether to add to what is there.
    add: bool,
}

impl<'a> Projection<'a> {
    fn new(linear: &'a Linear, lora: Option<&'a Lora>, to: &'a Shared<'a>) -> Self {
        Self { bias: linear.bias.as_ref(), lora, ..Self::of(&linear.weight, to) }
    }

    /// The matrix alone.
    fn of(weight: &'a Weight, to: &'a Shared<'a>) -> Self {
        Self { weight, bias: None, lora: None, to, add: false }
    }

    /// Enters the products of some tiles, `[tiles, B, 16]`, in place of what was there or in addition.
    ///
    /// # Safety
    /// Nobody else has these rows of `to` in this phase.
    unsafe fn enter(&self, tiles: Range<usize>, values: &[f32], low: &[f32]) -> Result<()> {
        let (rows, _) = self.weight.dims2()?;
        let batch = values.len() / tiles.len() / LANES;
        for (n, values) in values.chunks_exact(LANES).enumerate() {
            let (first, sequence) = ((tiles.start + n / batch) * LANES, n % batch);
            let own = first..rows.min(first + LANES);
            // SAFETY: by this function's own contract.
            let to =
                unsafe { self.to.write(sequence * rows + own.start..sequence * rows + own.end) };
            if self.add {
                to.iter_mut().zip(values).for_each(|(to, &value)| *to += value);
            } else {
                to.copy_from_slice(&values[..own.len()]);
            }
            if let Some(bias) = self.bias {
                with_values(bias, |bias: &[f32]| {
                    to.iter_mut().zip(&bias[own.clone()]).for_each(|(to, &bias)| *to += bias);
                })?;
            }
            if let Some(lora) = self.lora {
                let rank = low.len() / batch;
                let low = &low[sequence * rank..(sequence + 1) * rank];
                with_values(&lora.b, |b: &[f32]| {
                    let b = &b[own.start * rank..own.end * rank];
                    vectorize(
                        #[inline(always)]
                        || {
                            for (to, b) in to.iter_mut().zip(b.chunks_exact(rank)) {
                                *to += dot(b, low);
                            }
                        },
                    );
                })?;
            }
        }
        Ok(())
    }
}

impl Step<'_> {
    /// Projections, attention and the output projection of a layer.
    fn attention(
        &self,
        worker: &Worker<'_>,
        own: &mut Own,
        layer: &DecoderLayer,
        student: Option<&StudentLayer>,
        cache: &LayerCache,
    ) -> Result<()> {
        let none = LoraLayer::default();
        let lora = student.and_then(|student| student.lora.as_ref()).unwrap_or(&none);
        let gate = student
            .and_then(|student| student.gate_proj.clone())
            .map(|weight| Linear { weight: weight.into(), bias: None });
        let (q, k, v) = (&layer.q_proj, &layer.k_proj, &layer.v_proj);
        let mut projections = SmallVec::<[_; 4]>::new();
        projections.push(Projection::new(q, lora.q.as_ref(), &self.q));
        projections.push(Projection::new(k, lora.k.as_ref(), &self.k));
        projections.push(Projection::new(v, lora.v.as_ref(), &self.v));
        projections
            .extend(gate.as_ref().map(|gate| Projection::new(gate, lora.g.as_ref(), &self.gate)));
        let normed = Input::Normed(&layer.input_layernorm, layer.rms_norm_eps);
        self.project(worker, own, normed, &projections)?;

        let parts = match cache {
            LayerCache::Dense(cache) => cache.parts(),
            LayerCache::Hybrid(state) => state.parts(),
            #[cfg(feature = "cuda")]
            LayerCache::Cuda(_) => return Err(elsewhere()),
        };
        for unit in worker.phase(parts, parts)?.into_iter().flatten().flatten() {
            self.attend(unit, cache, parts, layer, gate.is_some(), own)?;
        }

        let output = Projection::new(&layer.o_proj, lora.o.as_ref(), &self.x);
        let attention = Input::Of(&self.attention);
        self.project(worker, own, attention, &[Projection { add: true, ..output }])
    }

    fn mlp(&self, worker: &Worker<'_>, own: &mut Own, layer: &DecoderLayer) -> Result<()> {
        let mlp = &layer.mlp;
        let (gate_weight, up_weight) = (&mlp.gate.weight, &mlp.up.weight);
        let (rows, _) = gate_weight.dims2()?;
        let hidden = Projection::of(gate_weight, &self.hidden);
        if let Some(work) = worker.phase(rows.div_ceil(LANES), SHARES)? {
            // SAFETY: the phase that wrote `x` is over, this one goes on.
            unsafe { self.normed(&mlp.norm, mlp.rms_norm_eps, &mut own.normed) }?;
            let Own { normed, sums, other_sums, tiles, other_tiles, .. } = &mut *own;
            gate_weight.group_sums_into(normed, sums);
            up_weight.group_sums_into(normed, other_sums);
            for part in work {
                let gate = take(tiles, part.len() * self.batch * LANES);
                let up = take(other_tiles, gate.len());
                gate_weight.multiply_tiles(part.clone(), normed, sums, gate)?;
                up_weight.multiply_tiles(part.clone(), normed, other_sums, up)?;
                add_bias(&mlp.gate, part.start, self.batch, gate)?;
                add_bias(&mlp.up, part.start, self.batch, up)?;
                vectorize(
                    #[inline(always)]
                    || {
                        let pairs = gate.iter_mut().zip(up.iter());
                        pairs.for_each(|(gate, &up)| *gate = silu(*gate) * up);
                    },
                );
                // SAFETY: shares are disjoint.
                unsafe { hidden.enter(part, gate, &[]) }?;
            }
        }
        let down = Projection { add: true, ..Projection::new(&mlp.down, None, &self.x) };
        self.project(worker, own, Input::Of(&self.hidden), &[down])
    }

    /// The norm of `x`, which every thread computes for itself.
    ///
    /// # Safety
    /// Nobody writes `x` meanwhile.
    unsafe fn normed(&self, weight: &Tensor, eps: f64, normed: &mut Vec<f32>) -> Result<()> {
        // SAFETY: by this function's own contract.
        let x = unsafe { self.x.read() };
        with_values(weight, |weight| rms_norm_rows(x, weight, eps, take(normed, x.len())))?;
        Ok(())
    }

    /// One phase: projections of the same `x` `[B, in]`.
    fn project(
        &self,
        worker: &Worker<'_>,
        own: &mut Own,
        input: Input<'_>,
        projections: &[Projection<'_>],
    ) -> Result<()> {
        let mut total = 0;
        for projection in projections {
            total += projection.weight.tiles()?;
        }
        let Some(work) = worker.phase(total, SHARES)? else { return Ok(()) };
        let Own { normed, prepared, tiles: values, .. } = own;
        // SAFETY: the phases that wrote `x` and the other inputs are over, and this one goes on while `x` is used.
        let x = unsafe {
            match input {
                Input::Normed(weight, eps) => {
                    self.normed(weight, eps, normed)?;
                    normed.as_slice()
                }
                Input::Of(shared) => shared.read(),
            }
        };
        prepared.resize_with(prepared.len().max(projections.len()), Prepared::default);
        let mut first_tile = 0;
        for (projection, prepared) in projections.iter().zip(&mut *prepared) {
            prepared.first_tile = first_tile;
            first_tile += projection.weight.tiles()?;
            projection.weight.group_sums_into(x, &mut prepared.sums);
            if let Some(lora) = projection.lora {
                update_input(lora, x, self.batch, &mut prepared.low)?;
            }
        }
        for part in work {
            for (projection, prepared) in projections.iter().zip(&*prepared) {
                let (first, tiles) = (prepared.first_tile, projection.weight.tiles()?);
                let part = part.start.clamp(first, first + tiles) - first
                    ..part.end.clamp(first, first + tiles) - first;
                if part.is_empty() {
                    continue;
                }
                let values = take(values, part.len() * self.batch * LANES);
                projection.weight.multiply_tiles(part.clone(), x, &prepared.sums, values)?;
                // SAFETY: shares are disjoint.
                unsafe { projection.enter(part, values, &prepared.low) }?;
            }
        }
        Ok(())
    }

    /// Norm, rotation and attention of one head of one sequence.
    fn attend(
        &self,
        unit: usize,
        cache: &LayerCache,
        units: usize,
        layer: &DecoderLayer,
        gated: bool,
        own: &mut Own,
    ) -> Result<()> {
        // SAFETY: the phase that wrote them is over.
        let (q, k, v, gate) =
            unsafe { (self.q.read(), self.k.read(), self.v.read(), self.gate.read()) };
        let d = layer.head_dim;
        let queries = unit * (q.len() / units)..(unit + 1) * (q.len() / units);
        // Selection heads may share a KV head.
        let kv = unit * (k.len() / d) / units * d;
        let sequence = (unit * self.batch / units, 0);
        let rotated = take(&mut own.rotated, queries.len() + d);
        let (to_q, to_k) = rotated.split_at_mut(queries.len());
        for (rows, norm, to) in
            [(&q[queries.clone()], &layer.q_norm, to_q), (&k[kv..kv + d], &layer.k_norm, to_k)]
        {
            let rows = match norm {
                Some(weight) => {
                    let normed = take(&mut own.head_normed, rows.len());
                    with_values(weight, |w| rms_norm_rows(rows, w, layer.rms_norm_eps, normed))?;
                    &*normed
                }
                None => rows,
            };
            for (from, to) in rows.chunks_exact(d).zip(to.chunks_exact_mut(d)) {
                self.rotation.apply(sequence, from, to, false);
            }
        }
        let (q, k) = rotated.split_at(queries.len());
        let v = &v[kv..kv + d];
        let gate = gated.then(|| {
            own.gate.clear();
            own.gate.extend(gate[queries.clone()].iter().map(|&x| sigmoid(x)));
            own.gate.as_slice()
        });
        // SAFETY: every head has its own part.
        let out = unsafe { self.attention.write(queries) };
        let scratch = &mut own.scratch;
        match cache {
            LayerCache::Hybrid(state) => {
                state.head(unit).feed(HeadRows { q, k, v, gate }, 1, false, scratch, out);
            }
            LayerCache::Dense(cache) => cache.head(unit).feed(q, k, v, scratch, out),
            #[cfg(feature = "cuda")]
            LayerCache::Cuda(_) => return Err(elsewhere()),
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
fn elsewhere() -> ModelError {
    ModelError::Invalid("a decode step on the CPU was given a cache on CUDA".into())
}

/// Adds a projection's bias, if it has one, to its products in tiles from tile `first` on, `[tiles, B, 16]`.
fn add_bias(linear: &Linear, first: usize, batch: usize, tiles: &mut [f32]) -> Result<()> {
    let Some(bias) = &linear.bias else { return Ok(()) };
    with_values(bias, |bias: &[f32]| {
        for (n, values) in tiles.chunks_exact_mut(LANES).enumerate() {
            let row = (first + n / batch) * LANES;
            // The last tile may have fewer rows.
            values.iter_mut().zip(&bias[row..]).for_each(|(value, &bias)| *value += bias);
        }
    })?;
    Ok(())
}

/// `scale · x Aᵀ`, `[B, rank]`, over what `low` held.
fn update_input(lora: &Lora, x: &[f32], batch: usize, low: &mut Vec<f32>) -> Result<()> {
    let (rank, inner) = lora.a.dims2()?;
    let low = take(low, batch * rank);
    with_values(&lora.a, |a: &[f32]| {
        vectorize(
            #[inline(always)]
            || {
                for (x, low) in x.chunks_exact(inner).zip(low.chunks_exact_mut(rank)) {
                    for (a, low) in a.chunks_exact(inner).zip(low) {
                        *low = lora.scale as f32 * dot(a, x);
                    }
                }
            },
        );
    })?;
    Ok(())
}
