//! Hybrid attention over whole sequences, differentiable.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::arguments::expect_shape;
use crate::cpu::backward::{RowGrads, Wanted, WeightGrads, backward};
use crate::cpu::forward::{
    FeatureMaps, HeadInput, PerHead, Record, Scratch, advance, should_split_heads,
};
use crate::cpu::head_state::{self, HeadState, unabsorbed};
use crate::cpu::rows::Rows;
use crate::error::AttentionError;
use crate::weights::inverse_sigmoid;
use crate::{
    HeadGeometry, HybridConfig, HybridWeights, LinearNorm, Mode, Result, Routing, RowDtype,
    Selection, router,
};
use still_compute::Real;
use still_compute::tensor::{borrow, slice};

pub(crate) const OP: &str = "hybrid_attention";

/// Output of [`hybrid_attention`].
#[derive(Clone, Debug)]
pub struct HybridOutput {
    /// Attention output per query head before `o_proj`, `[B, H, N, D]`.
    pub out: Tensor,
    /// The routing that was used, on the device of `out`.
    pub routing: Routing,
}

/// Hybrid attention of whole sequences that start at position 0.
///
/// * `q` `[B, H, N, D]`, `k` and `v` `[B, K, N, D]`: after RoPE, all of one dtype on one device.
/// * `gate` `[B, H, N, D]`: `γ = sigmoid(W_g x)`, with `config.gate`.
/// * `weights`: on the same device.
/// * `routing`: routing to use instead of the router's own (parity tests, recomputation).
///
/// On the CPU f32 and f64, everything that a configuration can say. On CUDA (feature `cuda`) f32 and bf16, head dimensions
/// 64, 96 and 128, chunks of 64 and the NP-Map with as many features, without gate and with a cap of at most 8192, and of ablations the linear
/// branch alone (without a cap) and all but it; nothing waits for the device.
///
/// Gradients flow to `q`, `k`, `v`, `gate` and every tensor of `weights`; routing is discrete and has none.
///
/// # Errors
/// Shapes that contradict each other or the configuration; a dtype, device or configuration without a kernel.
pub fn hybrid_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &HybridWeights,
    gate: Option<&Tensor>,
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<HybridOutput> {
    let (batch, num_heads, tokens, head_dim) = q.dims4()?;
    let (_, num_key_value_heads, _, _) = k.dims4()?;
    let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
    config.validate(geometry)?;
    let kv_shape = [batch, num_key_value_heads, tokens, head_dim];
    expect_shape(OP, "k", k, &kv_shape)?;
    expect_shape(OP, "v", v, &kv_shape)?;
    weights.check(geometry, config)?;
    if config.gate != gate.is_some() {
        return Err(AttentionError::Config(format!(
            "the output gate is {}, its value was {}",
            if config.gate { "on" } else { "off" },
            if gate.is_some() { "given" } else { "not given" },
        )));
    }
    if let Some(gate) = gate {
        expect_shape(OP, "gate", gate, q.dims())?;
    }
    match q.device() {
        Device::Cpu => on_cpu([q, k, v], weights, gate, geometry, config, routing),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            crate::cuda::hybrid_attention([q, k, v], weights, geometry, config, routing)
        }
        device => Err(AttentionError::Unsupported {
            op: OP,
            tensor: "q",
            expected: "a tensor on the CPU, or on CUDA in a build with the feature `cuda`",
            got: format!("on {:?}", device.location()),
        }),
    }
}

/// Checks a selection that was given against what it is given for.
pub(crate) fn check_given(
    given: &Selection,
    (batch, heads, tokens): (usize, usize, usize),
    config: &HybridConfig,
) -> Result<()> {
    let expected = (batch, heads, tokens, config.chunk);
    if (given.batch, given.heads, given.tokens, given.chunk) != expected {
        return Err(AttentionError::Config(format!(
            "the given selection is for {}x{}x{} tokens in chunks of {}, expected {expected:?}",
            given.batch, given.heads, given.tokens, given.chunk
        )));
    }
    let at_once = |(i, &at): (usize, &u32)| at as usize == i % tokens / config.chunk;
    if config.mode == Mode::LinearOnly && !given.absorbed_at.iter().enumerate().all(at_once) {
        return Err(AttentionError::Config(
            "linear_only absorbs every token at once: no other selection can be given".into(),
        ));
    }
    Ok(())
}

/// [`hybrid_attention`] by the CPU's kernels.
fn on_cpu(
    [q, k, v]: [&Tensor; 3],
    weights: &HybridWeights,
    gate: Option<&Tensor>,
    geometry: HeadGeometry,
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<HybridOutput> {
    let given = routing.map(Routing::selection).transpose()?;
    if let Some(given) = &given {
        let heads = geometry.selection_heads(config.selection_head);
        check_given(given, (q.dim(0)?, heads, q.dim(2)?), config)?;
    }
    let query_side = match gate {
        Some(gate) => Tensor::cat(&[q, gate], 3)?,
        None => q.clone(),
    };
    let key_side = Tensor::cat(&[k, v], 3)?;
    let (map_q, map_k) = weights.folded()?;
    let mut learned = vec![map_q.flatten_all()?, map_k.flatten_all()?];
    if let (Some(log_lambda), LinearNorm::Mean) = (&weights.log_lambda, config.linear_norm) {
        learned.push(log_lambda.clone());
    }
    learned.extend(weights.window_factor.clone());
    let learned = Tensor::cat(&learned, 0)?;

    let saved = Arc::new(OnceLock::new());
    let op = HybridOp {
        geometry,
        config: config.clone(),
        given,
        wanted: Wanted { qkv: q.track_op() || k.track_op() || v.track_op() },
        saved: saved.clone(),
    };
    let out = query_side.contiguous()?.apply_op3(&key_side.contiguous()?, &learned, op)?;
    let routing = saved
        .get()
        .cloned()
        .ok_or_else(|| AttentionError::Config("the kernel left no selection behind".into()))?;
    Ok(HybridOutput { out, routing })
}

/// `(query side [B, H, N, D (+ D)], key side [B, K, N, 2D], learned) → [B, H, N, D]`.
///
/// Rows of the query side are `[q | γ]`, of the key side `[k | v]`; what is learned is one vector,
/// `[W_q [H, D, F] | W_k [S, D, F] | ℓ [H] with LinearNorm::Mean | w [H] with a window factor]`.
struct HybridOp {
    geometry: HeadGeometry,
    config: HybridConfig,
    given: Option<Arc<Selection>>,
    wanted: Wanted,
    /// What the forward pass leaves for the backward pass and the caller.
    saved: Arc<OnceLock<Routing>>,
}

/// The three packed arguments as slices.
struct Packed<'a, T> {
    query: &'a [T],
    key: &'a [T],
    learned: &'a [T],
    /// `exp(ℓ)`, `[H]`, with `LinearNorm::Mean`.
    lambda: Option<Vec<T>>,
    /// `1 / sigmoid(w)`, `[H]`, with a window factor.
    against_window: Option<Vec<T>>,
    batch: usize,
    tokens: usize,
}

impl HybridOp {
    fn query_width(&self) -> usize {
        self.geometry.head_dim * if self.config.gate { 2 } else { 1 }
    }

    fn heads(&self) -> usize {
        self.geometry.selection_heads(self.config.selection_head)
    }

    /// Selection heads that share one KV head.
    fn shared(&self) -> usize {
        self.heads() / self.geometry.num_key_value_heads
    }

    /// Values of one head's `W`.
    fn map_size(&self) -> usize {
        self.geometry.head_dim * self.config.feature_dim
    }

    fn packed<'a, T: Real>(
        &self,
        query: &'a [T],
        key: &'a [T],
        learned: &'a [T],
        shape: &Shape,
    ) -> candle_core::Result<Packed<'a, T>> {
        let (batch, _, tokens, _) = shape.dims4()?;
        let maps = (self.geometry.num_heads + self.heads()) * self.map_size();
        let mut rest = learned[maps..].chunks_exact(self.geometry.num_heads.max(1));
        let mut vector = |wanted: bool, f: fn(T) -> T| -> Option<Vec<T>> {
            wanted.then(|| rest.next().unwrap_or(&[]).iter().map(|&x| f(x)).collect())
        };
        let lambda = vector(self.config.linear_norm == LinearNorm::Mean, |l| l.exp());
        let against_window = vector(self.config.window_factor, inverse_sigmoid);
        Ok(Packed { query, key, learned, lambda, against_window, batch, tokens })
    }

    /// The input of selection head `head` of sequence `sequence`.
    fn input<'a, T: Real>(
        &'a self,
        packed: &'a Packed<'a, T>,
        sequence: usize,
        head: usize,
        given: Option<&'a Selection>,
    ) -> HeadInput<'a, T> {
        let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = self.geometry;
        let group = num_heads / self.heads();
        let queries = head * group..(head + 1) * group;
        let (query_width, tokens) = (self.query_width(), packed.tokens);
        // Empty inputs have no column to start from.
        let rows = |data: &'a [T], block: usize, width: usize, column: usize| {
            let block = &data[block * tokens * width..(block + 1) * tokens * width];
            Rows::new(&block[column.min(block.len())..], width, d)
        };
        let query = |column: usize| {
            let rows = |h| rows(packed.query, sequence * num_heads + h, query_width, column);
            queries.clone().map(rows).collect::<PerHead<_>>()
        };
        let kv_head = sequence * num_key_value_heads + head / self.shared();
        let map = |index: usize| {
            let size = self.map_size();
            &packed.learned[index * size..(index + 1) * size]
        };
        let routing = match given {
            Some(selection) => head_state::Routing::Given(selection.row(sequence, head)),
            None => head_state::Routing::Scores {
                budget: router::effective_budget(&self.config, head),
                cap: self.config.cap,
            },
        };
        HeadInput {
            chunk: self.config.chunk,
            head_dim: d,
            layer: self.config.layer,
            mode: self.config.mode,
            head,
            router: self.config.router,
            branches: self.config.branches,
            routing,
            q: query(0),
            k: rows(packed.key, kv_head, 2 * d, 0),
            v: rows(packed.key, kv_head, 2 * d, d),
            gate: self.config.gate.then(|| query(d)),
            features: FeatureMaps {
                map: self.config.feature_map,
                q: queries.clone().map(map).collect(),
                k: map(num_heads + head),
                feature_dim: self.config.feature_dim,
            },
            lambda: packed.lambda.as_ref().map(|lambda| &lambda[queries.clone()]),
            against_window: packed.against_window.as_ref().map(|inverse| &inverse[queries]),
            split_heads: should_split_heads(packed.batch * self.heads()),
        }
    }

    fn forward<T: Real>(&self, packed: &Packed<'_, T>) -> Vec<T> {
        let (heads, d, tokens) = (self.heads(), self.geometry.head_dim, packed.tokens);
        let group = self.geometry.num_heads / heads;
        let mut out = vec![T::nan(); packed.batch * self.geometry.num_heads * tokens * d];
        let mut absorbed_at = unabsorbed(packed.batch * heads * tokens);
        let mut scores = vec![T::nan(); packed.batch * heads * tokens];
        out.par_chunks_mut((group * tokens * d).max(1))
            .zip(absorbed_at.par_chunks_mut(tokens.max(1)))
            .zip(scores.par_chunks_mut(tokens.max(1)))
            .enumerate()
            .for_each(|(task, ((out, absorbed_at), scores))| {
                let (sequence, head) = (task / heads, task % heads);
                let input = self.input(packed, sequence, head, self.given.as_deref());
                let mut state = HeadState::new(self.config.ring_chunk(), d, RowDtype::F32);
                let record = Record { absorbed_at: Some(absorbed_at), scores: Some(scores) };
                let mut scratch = Scratch::default();
                advance(&mut state, &input, tokens, out, tokens, record, &mut scratch);
            });
        let selection =
            Selection { chunk: self.config.chunk, batch: packed.batch, heads, tokens, absorbed_at };
        let scores = scores.into_iter().map(|score| score.wide() as f32).collect();
        // A second forward of one op object would be candle's doing, with the same result.
        let _ = self.saved.set(Routing::on_host(selection, scores));
        out
    }

    /// Gradients of the query side, the key side and what is learned.
    fn gradients<T: Real>(&self, packed: &Packed<'_, T>, out: &[T], d_out: &[T]) -> [Vec<T>; 3] {
        let Some(Ok(selection)) = self.saved.get().map(Routing::selection) else {
            unreachable!(
                "the backward pass follows the forward pass, which has left its routing on the host"
            );
        };
        let HeadGeometry { num_heads, num_key_value_heads: kv_heads, head_dim: d } = self.geometry;
        let (shared, tokens, query_width) = (self.shared(), packed.tokens, self.query_width());
        let group = num_heads / self.heads();
        let mut query = vec![T::zero(); packed.query.len()];
        let mut key = vec![T::zero(); packed.key.len()];
        let learned: Vec<Vec<WeightGrads<T>>> = query
            .par_chunks_mut((shared * group * tokens * query_width).max(1))
            .zip(key.par_chunks_mut((tokens * 2 * d).max(1)))
            .enumerate()
            .map(|(task, (query, key))| {
                let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
                let heads = query.chunks_mut(group * tokens * query_width).enumerate();
                heads
                    .map(|(i, query)| {
                        let head = kv_head * shared + i;
                        let input = self.input(packed, sequence, head, Some(&selection));
                        let start = (sequence * num_heads + head * group) * tokens * d;
                        let span = start..start + group * tokens * d;
                        let grads = RowGrads { query, query_width, key: &mut *key };
                        let selection = selection.row(sequence, head);
                        let (out, d_out) = (&out[span.clone()], &d_out[span]);
                        backward(&input, selection, tokens, out, d_out, self.wanted, grads)
                    })
                    .collect()
            })
            .collect();
        // In the order of the heads, whichever was first: an exactly resumed run depends on it.
        let mut sum = vec![T::zero(); packed.learned.len()];
        let size = self.map_size();
        for (index, grads) in learned.into_iter().flatten().enumerate() {
            let head = index % self.heads();
            let keys = (num_heads + head) * size;
            let mut parts = vec![(head * group * size, grads.map_q), (keys, grads.map_k)];
            let mut scales = (num_heads + self.heads()) * size + head * group;
            if packed.lambda.is_some() {
                parts.push((scales, grads.log_scale.clone()));
                scales += num_heads;
            }
            if let Some(inverse) = &packed.against_window {
                // d ln(1/sigmoid(w)) / dw = sigmoid(w) − 1.
                let inverse = inverse[head * group..].iter();
                let d_w = grads.log_scale.iter().zip(inverse);
                parts.push((scales, d_w.map(|(&d, &x)| d * (x.recip() - T::one())).collect()));
            }
            for (start, part) in parts {
                let to = &mut sum[start..start + part.len()];
                to.iter_mut().zip(part).for_each(|(to, x)| *to += x);
            }
        }
        [query, key, sum]
    }

    fn bwd_as<T: Real>(
        &self,
        [query, key, learned]: [&Tensor; 3],
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; 3]> {
        let gradients = |query_values: &[T], key_values: &[T], learned_values: &[T]| {
            let packed = self.packed(query_values, key_values, learned_values, query.shape())?;
            borrow(out, |out| borrow(d_out, |d_out| self.gradients(&packed, out, d_out)))?
        };
        let [d_query, d_key, d_learned] = borrow(query, |q: &[T]| {
            borrow(key, |k: &[T]| borrow(learned, |l: &[T]| gradients(q, k, l)))
        })????;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let rows = self.wanted.qkv || self.config.gate;
        Ok([
            rows.then(|| tensor(d_query, query)).transpose()?,
            self.wanted.qkv.then(|| tensor(d_key, key)).transpose()?,
            Some(tensor(d_learned, learned)?),
        ])
    }

    fn fwd_as<T: Real>(
        &self,
        (query, query_layout): (&CpuStorage, &Layout),
        (key, key_layout): (&CpuStorage, &Layout),
        (learned, learned_layout): (&CpuStorage, &Layout),
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = query_layout.shape();
        let packed = self.packed(
            slice::<T>(query, query_layout)?,
            slice(key, key_layout)?,
            slice(learned, learned_layout)?,
            shape,
        )?;
        let (batch, heads, tokens, _) = shape.dims4()?;
        let out = self.forward(&packed);
        let shape = Shape::from((batch, heads, tokens, self.geometry.head_dim));
        Ok((T::to_cpu_storage_owned(out), shape))
    }
}

impl CustomOp3 for HybridOp {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match s1 {
            CpuStorage::F32(_) => self.fwd_as::<f32>((s1, l1), (s2, l2), (s3, l3)),
            CpuStorage::F64(_) => self.fwd_as::<f64>((s1, l1), (s2, l2), (s3, l3)),
            _ => candle_core::bail!("{OP}: no CPU kernel for this dtype, expected f32 or f64"),
        }
    }

    fn bwd(
        &self,
        query: &Tensor,
        key: &Tensor,
        learned: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let args = [query, key, learned];
        let [query, key, learned] = match query.dtype() {
            DType::F64 => self.bwd_as::<f64>(args, out, d_out)?,
            _ => self.bwd_as::<f32>(args, out, d_out)?,
        };
        Ok((query, key, learned))
    }
}
