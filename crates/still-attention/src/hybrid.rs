//! Hybrid attention over whole sequences, differentiable.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::backward::{HeadGrads, Packing, Wanted, backward};
use crate::cpu::forward::{Features, HeadInput, Record, Scratch, advance, few};
use crate::cpu::head_state::{HeadState, Routing, unabsorbed};
use crate::cpu::rows::Rows;
use crate::error::AttentionError;
use crate::real::Real;
use crate::tensor::{expect_shape, slice};
use crate::{
    HeadGeometry, HybridConfig, HybridWeights, LinearNorm, Result, RowDtype, Selection, router,
};

const OP: &str = "hybrid_attention";

/// Output of [`hybrid_attention`].
#[derive(Clone, Debug)]
pub struct HybridOutput {
    /// Attention output per query head before `o_proj`, `[B, H, N, D]`.
    pub out: Tensor,
    /// The routing that was used.
    pub selection: Selection,
    /// Router scores `[B, S, N]`, row-major.
    pub scores: Vec<f32>,
}

/// Hybrid attention of whole sequences that start at position 0.
///
/// * `q` `[B, H, N, D]`, `k` and `v` `[B, K, N, D]`: after RoPE, f32 or f64, on the CPU.
/// * `gate` `[B, H, N, D]`: `γ = sigmoid(W_g x)`, with `config.gate`.
/// * `selection`: routing to use instead of the router's own (parity tests, recomputation).
///
/// Gradients flow to `q`, `k`, `v`, `gate` and every tensor of `weights`; routing is discrete and has none.
///
/// # Errors
/// Shapes that contradict each other or the configuration; a dtype or device without a kernel.
pub fn hybrid_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &HybridWeights,
    gate: Option<&Tensor>,
    config: &HybridConfig,
    selection: Option<&Selection>,
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
    let heads = geometry.selection_heads(config.selection_head);
    if let Some(given) = selection {
        let expected = (batch, heads, tokens, config.chunk);
        if (given.batch, given.heads, given.tokens, given.chunk) != expected {
            return Err(AttentionError::Config(format!(
                "the given selection is for {}x{}x{} tokens in chunks of {}, expected {expected:?}",
                given.batch, given.heads, given.tokens, given.chunk
            )));
        }
    }

    let mut query_side = vec![q.clone()];
    let mut key_side = vec![k.clone(), v.clone()];
    if config.branches.linear {
        let (phi_q, phi_k) = weights.features(q, k, config)?;
        query_side.push(phi_q);
        // φ_k of the selection heads that share a KV head lie side by side in its rows.
        let shared = heads / num_key_value_heads;
        let width = phi_k.dim(3)?;
        let phi_k = phi_k
            .reshape((batch, num_key_value_heads, shared, tokens, width))?
            .transpose(2, 3)?
            .reshape((batch, num_key_value_heads, tokens, shared * width))?;
        key_side.push(phi_k);
    }
    if let Some(gate) = gate {
        expect_shape(OP, "gate", gate, q.dims())?;
        query_side.push(gate.clone());
    }
    let query_side = Tensor::cat(&query_side, 3)?.contiguous()?;
    let key_side = Tensor::cat(&key_side, 3)?.contiguous()?;
    let log_lambda = match (&weights.log_lambda, config.linear_norm) {
        (Some(log_lambda), LinearNorm::Mean) => log_lambda.contiguous()?,
        _ => Tensor::zeros(num_heads, q.dtype(), q.device())?,
    };

    let saved = Arc::new(OnceLock::new());
    let op = HybridOp {
        geometry,
        config: config.clone(),
        given: selection.cloned(),
        wanted: Wanted { qkv: q.track_op() || k.track_op() || v.track_op() },
        saved: saved.clone(),
    };
    let out = query_side.apply_op3(&key_side, &log_lambda, op)?;
    let saved: &Saved = saved
        .get()
        .ok_or_else(|| AttentionError::Config("the kernel left no selection behind".into()))?;
    Ok(HybridOutput { out, selection: saved.selection.clone(), scores: saved.scores.clone() })
}

/// What the forward pass leaves for the backward pass and the caller.
#[derive(Debug)]
struct Saved {
    selection: Selection,
    scores: Vec<f32>,
}

/// `(query side [B, H, N, D + 2F (+ D)], key side [B, K, N, 2D + shared·2F], ℓ [H]) → [B, H, N, D]`.
struct HybridOp {
    geometry: HeadGeometry,
    config: HybridConfig,
    given: Option<Selection>,
    wanted: Wanted,
    saved: Arc<OnceLock<Saved>>,
}

/// The three packed arguments as slices, and how to cut them.
struct Packed<'a, T> {
    query: &'a [T],
    key: &'a [T],
    lambda: Vec<T>,
    batch: usize,
    tokens: usize,
}

impl HybridOp {
    fn phi_width(&self) -> usize {
        if self.config.branches.linear { 2 * self.config.feature_dim } else { 0 }
    }

    fn query_width(&self) -> usize {
        let d = self.geometry.head_dim;
        d + self.phi_width() + if self.config.gate { d } else { 0 }
    }

    fn heads(&self) -> usize {
        self.geometry.selection_heads(self.config.selection_head)
    }

    /// Selection heads that share one KV head.
    fn shared(&self) -> usize {
        self.heads() / self.geometry.num_key_value_heads
    }

    fn packing(&self, head: usize) -> Packing {
        let key_width = 2 * self.geometry.head_dim + self.shared() * self.phi_width();
        Packing {
            query_width: self.query_width(),
            key_width,
            phi_k: 2 * self.geometry.head_dim + head % self.shared() * self.phi_width(),
        }
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
        let Packing { query_width, key_width, phi_k } = self.packing(head);
        let phi = self.phi_width();
        let query = |column: usize, width: usize| {
            (head * group..(head + 1) * group)
                .map(|h| {
                    let start = (sequence * num_heads + h) * packed.tokens * query_width;
                    let end = start + packed.tokens * query_width;
                    Rows::new(&packed.query[(start + column).min(end)..end], query_width, width)
                })
                .collect::<Vec<_>>()
        };
        let start =
            (sequence * num_key_value_heads + head / self.shared()) * packed.tokens * key_width;
        let end = start + packed.tokens * key_width;
        let key = |column: usize, width: usize| {
            Rows::new(&packed.key[(start + column).min(end)..end], key_width, width)
        };
        let routing = match given {
            Some(selection) => Routing::Given(selection.row(sequence, head)),
            None => Routing::Scores {
                budget: router::effective_budget(&self.config, head),
                cap: self.config.cap,
            },
        };
        let mean = self.config.linear_norm == LinearNorm::Mean;
        HeadInput {
            chunk: self.config.chunk,
            head_dim: d,
            layer: self.config.layer,
            head,
            router: self.config.router,
            branches: self.config.branches,
            routing,
            q: query(0, d),
            k: key(0, d),
            v: key(d, d),
            gate: self.config.gate.then(|| query(d + phi, d)),
            features: Features::Given { q: query(d, phi), k: key(phi_k, phi), width: phi },
            lambda: mean.then(|| &packed.lambda[head * group..(head + 1) * group]),
            split_heads: few(packed.batch * self.heads()),
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
                let input = self.input(packed, sequence, head, self.given.as_ref());
                let mut state = HeadState::new(self.config.chunk, d, RowDtype::F32);
                let record = Record { absorbed_at: Some(absorbed_at), scores: Some(scores) };
                let mut scratch = Scratch::default();
                advance(&mut state, &input, tokens, out, tokens, record, &mut scratch);
            });
        let selection =
            Selection { chunk: self.config.chunk, batch: packed.batch, heads, tokens, absorbed_at };
        let scores = scores.into_iter().map(|score| score.wide() as f32).collect();
        // A second forward of one op object would be candle's doing, with the same result.
        let _ = self.saved.set(Saved { selection, scores });
        out
    }

    fn gradients<T: Real>(&self, packed: &Packed<'_, T>, out: &[T], d_out: &[T]) -> [Vec<T>; 3] {
        let Some(saved) = self.saved.get() else {
            unreachable!("the backward pass follows the forward pass");
        };
        let HeadGeometry { num_heads, num_key_value_heads: kv_heads, head_dim: d } = self.geometry;
        let (shared, tokens) = (self.shared(), packed.tokens);
        let group = num_heads / self.heads();
        let Packing { query_width, key_width, .. } = self.packing(0);
        let mut query = vec![T::zero(); packed.query.len()];
        let mut key = vec![T::zero(); packed.key.len()];
        let mut log_lambda = vec![T::zero(); packed.batch * num_heads];
        let per_kv = num_heads / kv_heads;
        query
            .par_chunks_mut((per_kv * tokens * query_width).max(1))
            .zip(key.par_chunks_mut((tokens * key_width).max(1)))
            .zip(log_lambda.par_chunks_mut(per_kv))
            .enumerate()
            .for_each(|(task, ((query, key), log_lambda))| {
                let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
                for i in 0..shared {
                    let head = kv_head * shared + i;
                    let input = self.input(packed, sequence, head, Some(&saved.selection));
                    let span = {
                        let start = (sequence * num_heads + head * group) * tokens * d;
                        start..start + group * tokens * d
                    };
                    let rows = i * group * tokens * query_width;
                    let mut grads = HeadGrads {
                        query: &mut query[rows..rows + group * tokens * query_width],
                        key,
                        log_lambda: &mut log_lambda[i * group..(i + 1) * group],
                        packing: self.packing(head),
                    };
                    backward(
                        &input,
                        saved.selection.row(sequence, head),
                        tokens,
                        &out[span.clone()],
                        &d_out[span],
                        self.wanted,
                        &mut grads,
                    );
                }
            });
        let mut summed = vec![T::zero(); num_heads];
        for part in log_lambda.chunks_exact(num_heads) {
            summed.iter_mut().zip(part).for_each(|(sum, &x)| *sum += x);
        }
        [query, key, summed]
    }

    fn bwd_as<T: Real>(
        &self,
        args: [&Tensor; 3],
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<[Tensor; 3]> {
        let flat = |tensor: &Tensor| tensor.contiguous()?.flatten_all()?.to_vec1::<T>();
        let (query, key, log_lambda) = (flat(args[0])?, flat(args[1])?, flat(args[2])?);
        let packed = Packed {
            query: &query,
            key: &key,
            lambda: log_lambda.iter().map(|l| l.exp()).collect(),
            batch: args[0].dim(0)?,
            tokens: args[0].dim(2)?,
        };
        let [query, key, log_lambda] = self.gradients(&packed, &flat(out)?, &flat(d_out)?);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok([tensor(query, args[0])?, tensor(key, args[1])?, tensor(log_lambda, args[2])?])
    }

    fn fwd_as<T: Real>(
        &self,
        (query, query_layout): (&CpuStorage, &Layout),
        (key, key_layout): (&CpuStorage, &Layout),
        (log_lambda, log_lambda_layout): (&CpuStorage, &Layout),
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, heads, tokens, _) = query_layout.shape().dims4()?;
        let log_lambda = slice::<T>(log_lambda, log_lambda_layout)?;
        let packed = Packed {
            query: slice(query, query_layout)?,
            key: slice(key, key_layout)?,
            lambda: log_lambda.iter().map(|l| l.exp()).collect(),
            batch,
            tokens,
        };
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
        log_lambda: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let args = [query, key, log_lambda];
        let [query, key, log_lambda] = match query.dtype() {
            DType::F64 => self.bwd_as::<f64>(args, out, d_out)?,
            _ => self.bwd_as::<f32>(args, out, d_out)?,
        };
        Ok((Some(query), Some(key), Some(log_lambda)))
    }
}
