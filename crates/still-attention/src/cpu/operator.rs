//! The operator over whole sequences of slices, forward and backward: threads over (sequence, selection head).

use rayon::prelude::*;

use super::backward::backward;
use super::call::{Record, Scratch};
use super::forward::advance;
use super::gradients::{RowGrads, Wanted, WeightGrads, add, parts};
use super::head_input::{FeatureMaps, HeadInput, PerHead, Routing, should_split_heads};
use super::head_state::{HeadState, unabsorbed};
use super::rows::Rows;
use super::whole_head;
use crate::config::logit_scale;
use crate::{HeadGeometry, HybridConfig, RowDtype, Selection, router};
use still_compute::Real;

/// What the operator is computed from.
pub(crate) struct Operands<'a, T> {
    /// `[B, H, N, D]`
    pub q: &'a [T],
    /// `[B, K, N, D]`
    pub k: &'a [T],
    /// `[B, K, N, D]`
    pub v: &'a [T],
    /// `γ`, `[B, H, N, D]`, if there is an output gate.
    pub gate: Option<&'a [T]>,
    /// `W` of `φ_q`, `[H, D, F]`, reflections folded in.
    pub map_q: &'a [T],
    /// `W` of `φ_k`, `[S, D, F]`.
    pub map_k: &'a [T],
    /// `exp(ℓ)`, `[H]`, with `LinearNorm::Mean`.
    pub lambda: Option<Vec<T>>,
    /// `1 / sigmoid(w)`, `[H]`, with a window factor.
    pub against_window: Option<Vec<T>>,
}

/// What the forward pass decides.
pub(crate) struct Routed {
    pub selection: Selection,
    /// `[B, S, N]`
    pub scores: Vec<f32>,
}

/// Gradients of what the operator is computed from, of the same shapes.
pub(crate) struct Gradients<T> {
    /// Of `q`, `k` and `v`: empty if they are not wanted.
    pub qkv: [Vec<T>; 3],
    /// Empty without a gate.
    pub gate: Vec<T>,
    pub map_q: Vec<T>,
    pub map_k: Vec<T>,
    /// `∂/∂ ln(scale of the linear branch)`, `[H]`.
    pub log_scale: Vec<T>,
}

/// The operator on sequences of one shape.
pub(crate) struct Operator<'a> {
    pub geometry: HeadGeometry,
    pub config: &'a HybridConfig,
    pub batch: usize,
    pub tokens: usize,
}

impl Operator<'_> {
    fn heads(&self) -> usize {
        self.geometry.selection_heads(self.config.selection_head)
    }

    /// Query heads of a selection head.
    fn group(&self) -> usize {
        self.geometry.num_heads / self.heads()
    }

    /// Selection heads that share one KV head.
    fn shared(&self) -> usize {
        self.heads() / self.geometry.num_key_value_heads
    }

    /// Values of one head's `W`.
    fn map_size(&self) -> usize {
        self.geometry.head_dim * self.config.feature_dim
    }

    /// The input of selection head `head` of sequence `sequence`.
    fn input<'a, T: Real>(
        &'a self,
        operands: &'a Operands<'a, T>,
        sequence: usize,
        head: usize,
        given: Option<&'a Selection>,
    ) -> HeadInput<'a, T> {
        let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = self.geometry;
        let queries = head * self.group()..(head + 1) * self.group();
        let size = self.tokens * d;
        let rows =
            |data: &'a [T], head: usize| Rows::new(&data[head * size..(head + 1) * size], d, d);
        let by_query = |data: &'a [T]| {
            let rows = |head| rows(data, sequence * num_heads + head);
            queries.clone().map(rows).collect::<PerHead<_>>()
        };
        let kv_head = sequence * num_key_value_heads + head / self.shared();
        let size = self.map_size();
        let map = |maps: &'a [T], head: usize| &maps[head * size..(head + 1) * size];
        let routing = match given {
            Some(selection) => Routing::Given(selection.row(sequence, head)),
            None => Routing::Scores {
                budget: router::effective_budget(self.config, head),
                cap: self.config.cap,
            },
        };
        HeadInput {
            chunk: self.config.chunk,
            head_dim: d,
            layer: self.config.layer,
            mode: self.config.mode,
            logit_scale: T::of(logit_scale(self.config.logit_scale, d)),
            head,
            router: self.config.router,
            branches: self.config.branches,
            routing,
            q: by_query(operands.q),
            k: rows(operands.k, kv_head),
            v: rows(operands.v, kv_head),
            gate: operands.gate.map(by_query),
            features: FeatureMaps {
                map: self.config.feature_map,
                q: queries.clone().map(|head| map(operands.map_q, head)).collect(),
                k: map(operands.map_k, head),
                feature_dim: self.config.feature_dim,
            },
            lambda: operands.lambda.as_ref().map(|lambda| &lambda[queries.clone()]),
            against_window: operands.against_window.as_ref().map(|inverse| &inverse[queries]),
            split_heads: should_split_heads(self.batch * self.heads()),
            beforehand: &[],
        }
    }

    /// The output `[B, H, N, D]`, by the router's decision or by a selection that is given.
    pub fn forward<T: Real>(
        &self,
        operands: &Operands<'_, T>,
        given: Option<&Selection>,
    ) -> (Vec<T>, Routed) {
        let mut out = vec![T::nan(); operands.q.len()];
        let routed = self.forward_into(operands, given, &mut out, None);
        (out, routed)
    }

    /// [`Operator::forward`] into `out`, of which every value is written, and the linear states at the end into `sums`: `S` and then `z`
    /// of each head, `[B, S, 2F, D + 1]`; left alone where nothing was absorbed.
    pub fn forward_into<T: Real>(
        &self,
        operands: &Operands<'_, T>,
        given: Option<&Selection>,
        out: &mut [T],
        sums: Option<&mut [T]>,
    ) -> Routed {
        let (heads, d, tokens) = (self.heads(), self.geometry.head_dim, self.tokens);
        let mut absorbed_at = unabsorbed(self.batch * heads * tokens);
        let mut scores = vec![T::nan(); self.batch * heads * tokens];
        let mut sums = match sums {
            Some(sums) => parts(sums, self.batch * heads),
            None => parts(&mut [], self.batch * heads),
        };
        out.par_chunks_mut((self.group() * tokens * d).max(1))
            .zip(&mut sums)
            .zip(absorbed_at.par_chunks_mut(tokens.max(1)))
            .zip(scores.par_chunks_mut(tokens.max(1)))
            .enumerate()
            .for_each(|(task, (((out, sums), absorbed_at), scores))| {
                let (sequence, head) = (task / heads, task % heads);
                let input = self.input(operands, sequence, head, given);
                if whole_head::is_whole(&input) {
                    return whole_head::forward(&input, out, scores);
                }
                // A given selection says by position what is demoted.
                let ranked = self.config.cap.is_some() || given.is_some();
                let chunk = self.config.ring_chunk();
                let mut state = HeadState::new(chunk, d, RowDtype::F32, ranked);
                let record = Record { absorbed_at: Some(absorbed_at), scores: Some(scores) };
                let mut scratch = Scratch::default();
                advance(&mut state, &input, tokens, out, tokens, record, &mut scratch);
                if state.count > 0 && !sums.is_empty() {
                    let (s, z) = sums.split_at_mut(state.s.len());
                    s.copy_from_slice(&state.s);
                    z.copy_from_slice(&state.z);
                }
            });
        let (chunk, batch) = (self.config.chunk, self.batch);
        let selection = Selection { chunk, batch, heads, tokens, absorbed_at };
        Routed { selection, scores: scores.iter().map(|score| score.wide() as f32).collect() }
    }

    /// Gradients from `d_out` of the output `out` that this selection gave.
    pub fn backward<T: Real>(
        &self,
        operands: &Operands<'_, T>,
        selection: &Selection,
        (out, d_out): (&[T], &[T]),
        wanted: Wanted,
    ) -> Gradients<T> {
        let HeadGeometry { num_heads, num_key_value_heads: kv_heads, head_dim: d } = self.geometry;
        let (group, shared, tokens) = (self.group(), self.shared(), self.tokens);
        let zeros = |like: &[T], wanted: bool| vec![T::zero(); if wanted { like.len() } else { 0 }];
        let mut qkv = [operands.q, operands.k, operands.v].map(|rows| zeros(rows, wanted.qkv));
        let mut gate = operands.gate.map_or(Vec::new(), |gate| zeros(gate, true));

        let tasks = self.batch * kv_heads;
        let [d_q, d_k, d_v] = qkv.each_mut().map(|rows| parts(rows, tasks));
        let of_queries = d_q.into_par_iter().zip(parts(&mut gate, tasks));
        let of_keys = d_k.into_par_iter().zip(d_v);
        let learned: Vec<Vec<WeightGrads<T>>> = of_queries
            .zip(of_keys)
            .enumerate()
            .map(|(task, ((d_q, d_gate), (d_k, d_v)))| {
                let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
                let of_heads = parts(d_q, shared).into_iter().zip(parts(d_gate, shared));
                let head = |(i, (q, gate))| {
                    let head = kv_head * shared + i;
                    let input = self.input(operands, sequence, head, Some(selection));
                    let start = (sequence * num_heads + head * group) * tokens * d;
                    let span = start..start + group * tokens * d;
                    let outs = (&out[span.clone()], &d_out[span]);
                    let grads = RowGrads { q, gate, k: &mut *d_k, v: &mut *d_v };
                    backward(&input, selection.row(sequence, head), tokens, outs, wanted, grads)
                };
                of_heads.enumerate().map(head).collect()
            })
            .collect();

        // In the order of the heads, whichever was first: an exactly resumed run depends on it.
        let mut map_q = vec![T::zero(); operands.map_q.len()];
        let mut map_k = vec![T::zero(); operands.map_k.len()];
        let mut log_scale = vec![T::zero(); num_heads];
        let size = self.map_size();
        for (index, grads) in learned.into_iter().flatten().enumerate() {
            let head = index % self.heads();
            add(&mut map_q[head * group * size..], &grads.map_q);
            add(&mut map_k[head * size..], &grads.map_k);
            add(&mut log_scale[head * group..], &grads.log_scale);
        }
        Gradients { qkv, gate, map_q, map_k, log_scale }
    }
}
