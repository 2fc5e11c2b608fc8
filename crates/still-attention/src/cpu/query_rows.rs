//! The queries of one segment: everything that they attend to, in a few matrix products.

use std::ops::Range;

use super::cells::round_to_bf16;
use super::feature_map::map_into;
use super::forward::HeadInput;
use super::key_store::{KeyStore, TILE};
use super::paired_keys::{PairUnit, PairedKeys, Softmax};
use super::rows::RowStore;
use super::weighted_sum::matmul_small_batch;
use crate::config::Router;
use crate::router;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

/// Which tokens of a call a segment is: within one chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// First token of the call.
    pub start: usize,
    /// Tokens.
    pub length: usize,
    /// Tokens from one query head's output to the next one's.
    pub stride: usize,
}

/// Some of the keys that a segment's queries see, with their values.
#[derive(Clone, Debug)]
pub(crate) enum Part<'a, T> {
    /// As they are stored, for a small batch of queries: a product then reads no more than the store has.
    Stored { k: &'a KeyStore<T>, v: &'a RowStore<T>, rows: Range<usize> },
    /// Upcast to the kernel's type, for many: `Kᵀ` `[D, n]` and `V` `[n, D]`.
    Wide { k: &'a [T], v: &'a [T] },
}

/// Query rows up to which keys are best read as they are stored.
pub(crate) const SMALL_BATCH: usize = 8;

/// Salient keys that are attended to at a time: their logits and the keys and values themselves stay in a core's own cache,
/// however many there are.
const BLOCK: usize = 256;

impl<'a, T: Real> Part<'a, T> {
    /// `rows` of a pair of stores, upcast into `scratch` if there are many queries.
    pub fn new(
        (k, v): (&'a KeyStore<T>, &'a RowStore<T>),
        rows: Range<usize>,
        queries: usize,
        (wide_k, wide_v): (&'a mut Vec<T>, &'a mut Vec<T>),
    ) -> Self {
        if queries <= SMALL_BATCH {
            Self::Stored { k, v, rows }
        } else {
            Self::Wide { k: k.transposed(rows.clone(), wide_k), v: v.read(rows, wide_v) }
        }
    }

    /// Keys.
    fn len(&self, head_dim: usize) -> usize {
        match self {
            Self::Stored { rows, .. } => rows.len(),
            Self::Wide { v, .. } => v.len() / head_dim,
        }
    }

    /// All of it.
    fn all(&self, head_dim: usize) -> Range<usize> {
        0..self.len(head_dim)
    }

    /// `q Kᵀ` of `q` `[rows, D]` and the keys of `part` into rows of `stride` values.
    #[inline(always)]
    fn logits(&self, part: Range<usize>, q: &[T], head_dim: usize, to: &mut [T], stride: usize) {
        match self {
            Self::Stored { k, rows, .. } => {
                k.dots(rows.start + part.start..rows.start + part.end, q, to, stride);
            }
            Self::Wide { k, .. } => {
                let (rows, keys) = (q.len() / head_dim, self.len(head_dim));
                let (q, k) = (Mat::rows(q, head_dim), Mat::rows(&k[part.start..], keys));
                matmul((rows, part.len(), head_dim), to, stride, false, q, k);
            }
        }
    }

    /// Adds `weights V` of the keys of `part` to `out` `[rows, D]`; the weights have rows of `stride` values.
    #[inline(always)]
    fn attend(
        &self,
        part: Range<usize>,
        weights: &[T],
        stride: usize,
        head_dim: usize,
        out: &mut [T],
    ) {
        match self {
            Self::Stored { v, rows, .. } => {
                let rows = rows.start + part.start..rows.start + part.end;
                v.add_weighted(rows, weights, stride, out);
            }
            Self::Wide { v, .. } => {
                let rows = out.len() / head_dim;
                let v = Mat::rows(&v[part.start * head_dim..], head_dim);
                let weights = Mat::rows(weights, stride);
                matmul((rows, head_dim, part.len()), out, head_dim, true, weights, v);
            }
        }
    }
}

/// The salient keys, with their values.
#[derive(Clone, Debug)]
pub(crate) enum Salient<'a, T> {
    Part {
        part: Part<'a, T>,
        /// Whether queries are rounded to bf16 as the keys are: then every CPU, however many the queries, multiplies the same.
        rounded: bool,
    },
    /// bf16 keys of many f32 queries, where the CPU multiplies such pairs.
    Paired(PairedKeys<'a>),
}

impl<'a, T: Real> Salient<'a, T> {
    /// The first `rows` rows of a pair of stores; see [`Part::new`].
    pub fn new(
        (k, v): (&'a KeyStore<T>, &'a RowStore<T>),
        rows: usize,
        queries: usize,
        (paired_k, wide_k, wide_v): (&'a mut Vec<[u32; TILE]>, &'a mut Vec<T>, &'a mut Vec<T>),
    ) -> Self {
        let head_dim = k.width();
        let pairs = queries > SMALL_BATCH && k.is_bf16() && T::as_f32s(&[]).is_some();
        let Some(unit) = PairUnit::find().filter(|_| pairs) else {
            let part = Part::new((k, v), 0..rows, queries, (wide_k, wide_v));
            return Self::Part { part, rounded: k.is_bf16() };
        };
        let v = T::as_f32s(v.read(0..rows, wide_v)).expect("values are f32, as was asked");
        let k = k.paired(rows, paired_k).expect("keys are bf16, as was asked");
        Self::Paired(PairedKeys { unit, k, v, head_dim })
    }
}

/// What one segment's queries see.
#[derive(Clone, Debug)]
pub(crate) struct Keys<'a, T> {
    pub previous: Part<'a, T>,
    pub current: Part<'a, T>,
    pub salient: Salient<'a, T>,
    pub state: Option<(&'a [T], &'a [T])>,
    pub count: usize,
    /// Tokens of the current chunk that came before this segment.
    pub offset: usize,
}

/// Memory of [`query_rows`] and its like. Every buffer is written before it is read, so that what a call left may stay.
#[derive(Clone, Debug)]
pub(crate) struct Buffers<T> {
    q: Vec<T>,
    pairs: Vec<u32>,
    pub(super) local: Vec<T>,
    exact: Vec<T>,
    pub(super) attended: Vec<T>,
    pub(super) denominator: Vec<T>,
    maximum: Vec<T>,
    pub(super) phi: Vec<T>,
    linear: Vec<T>,
}

impl<T> Default for Buffers<T> {
    fn default() -> Self {
        let new = Vec::new;
        Self {
            q: new(),
            pairs: Vec::new(),
            local: new(),
            exact: new(),
            attended: new(),
            denominator: new(),
            maximum: new(),
            phi: new(),
            linear: new(),
        }
    }
}

/// The first `length` values, whatever they are.
pub(crate) fn take<T: Real>(buffer: &mut Vec<T>, length: usize) -> &mut [T] {
    buffer.resize(length, T::nan());
    buffer
}

/// Answers the segment's tokens of the query heads `heads`, stacked so that they share each matrix product.
///
/// `out` is `[heads, stride, D]`, of which the segment's rows are written. `scores` has `[heads, length]` for the
/// Self-Saliency Scores of the queries, with `Router::ReceivedAttention` `[heads, keys of the window]` for the
/// attention that each key receives from them. For callers that are within [`vector::vectorize`].
#[inline(always)]
pub(crate) fn query_rows<T: Real>(
    keys: &Keys<'_, T>,
    input: &HeadInput<'_, T>,
    heads: Range<usize>,
    segment: Segment,
    out: &mut [T],
    scores: &mut [T],
    buffers: &mut Buffers<T>,
) {
    let Segment { start, length, stride } = segment;
    let d = input.head_dim;
    let rows = heads.len() * length;
    // Scaling the queries costs less than scaling the logits.
    let scale = input.logit_scale();
    let q = take(&mut buffers.q, rows * d);
    for (row, q) in q.chunks_exact_mut(d).enumerate() {
        let (head, token) = (heads.start + row / length, start + row % length);
        for (q, &x) in q.iter_mut().zip(input.q[head].row(token)) {
            *q = x * scale;
        }
    }

    // Logits against the window, in order of position: [previous | current].
    let previous = keys.previous.len(d);
    let width = previous + keys.current.len(d);
    let local = take(&mut buffers.local, rows * width);
    keys.previous.logits(keys.previous.all(d), q, d, local, width);
    keys.current.logits(keys.current.all(d), q, d, &mut local[previous..], width);

    let receives = input.router == Router::ReceivedAttention;
    if receives {
        scores.fill(T::zero());
    }
    let denominator = take(&mut buffers.denominator, rows);
    let maximum = take(&mut buffers.maximum, rows);
    for row in 0..rows {
        let local = &mut local[row * width..(row + 1) * width];
        let (visible, future) = local.split_at_mut(previous + keys.offset + row % length + 1);
        future.fill(T::zero());
        let received =
            if receives { &mut scores[row / length * width..][..width] } else { &mut [] };
        let weights = RowWeights::new(visible, &mut [], input, received);
        if !receives {
            scores[row] = weights.score;
        }
        (denominator[row], maximum[row]) = (weights.denominator, weights.maximum);
    }
    let attended = take(&mut buffers.attended, rows * d);
    attended.fill(T::zero());
    keys.previous.attend(keys.previous.all(d), local, width, d, attended);
    keys.current.attend(keys.current.all(d), &local[previous..], width, d, attended);

    match &keys.salient {
        Salient::Part { part, rounded } => {
            if *rounded {
                q.iter_mut().for_each(|x| *x = round_to_bf16(*x));
            }
            let softmax = (&mut *attended, &mut *denominator, &mut *maximum);
            attend_salient(part, q, d, softmax, &mut buffers.exact);
        }
        Salient::Paired(keys) => {
            q.iter_mut().for_each(|x| *x = round_to_bf16(*x));
            let rows = (T::as_f32s(q), T::as_f32s_mut(attended));
            let sums = (T::as_f32s_mut(denominator), T::as_f32s_mut(maximum));
            let ((Some(q), Some(attended)), (Some(denominator), Some(maximum))) = (rows, sums)
            else {
                unreachable!("keys are paired for f32 only");
            };
            keys.attend(q, Softmax { attended, denominator, maximum }, &mut buffers.pairs);
        }
    }

    if let (Some((s, z)), true) = (keys.state, input.branches.linear) {
        let features = z.len();
        let phi = take(&mut buffers.phi, rows * features);
        for (head, phi) in heads.clone().zip(phi.chunks_exact_mut(length * features)) {
            let maps = &input.features;
            map_into(maps.map, input.q[head].mat(start), maps.q[head], maps.feature_dim, phi);
        }
        let linear = take(&mut buffers.linear, rows * d);
        if rows <= SMALL_BATCH {
            matmul_small_batch((d, features), linear, d, false, (phi, features), s);
        } else {
            let phi = Mat::rows(phi, features);
            matmul((rows, d, features), linear, d, false, phi, Mat::rows(s, d));
        }
        for row in 0..rows {
            let (head, token) = (heads.start + row / length, start + row % length);
            let scale = input.linear_scale(head, keys.count);
            denominator[row] += scale * vector::dot(&phi[row * features..(row + 1) * features], z);
            let attended = &mut attended[row * d..(row + 1) * d];
            let linear = &linear[row * d..(row + 1) * d];
            match &input.gate {
                Some(gate) => {
                    let gate = gate[head].row(token);
                    for ((attended, &linear), &gate) in attended.iter_mut().zip(linear).zip(gate) {
                        *attended += scale * gate * linear;
                    }
                }
                None => vector::axpy(attended, scale, linear),
            }
        }
    }
    for (row, attended) in attended.chunks_exact(d).enumerate() {
        let to = (row / length * stride + start + row % length) * d;
        let inverse = T::one() / denominator[row];
        for (out, &x) in out[to..to + d].iter_mut().zip(attended) {
            *out = x * inverse;
        }
    }
}

/// Adds salient keys to the softmax of the queries `q` `[rows, D]`, a block at a time: a larger maximum shrinks what was
/// added before.
#[inline(always)]
fn attend_salient<T: Real>(
    keys: &Part<'_, T>,
    q: &[T],
    d: usize,
    (attended, denominator, maximum): (&mut [T], &mut [T], &mut [T]),
    exact: &mut Vec<T>,
) {
    let (rows, salient) = (denominator.len(), keys.len(d));
    let exact = take(exact, rows * salient.min(BLOCK));
    for start in (0..salient).step_by(BLOCK) {
        let block = start..salient.min(start + BLOCK);
        let width = block.len();
        keys.logits(block.clone(), q, d, exact, width);
        for (row, exact) in exact.chunks_exact_mut(width).take(rows).enumerate() {
            let top = vector::max(exact);
            if top > maximum[row] {
                let shrink = (maximum[row] - top).fast_exp();
                denominator[row] *= shrink;
                attended[row * d..(row + 1) * d].iter_mut().for_each(|sum| *sum *= shrink);
                maximum[row] = top;
            }
            denominator[row] += vector::exp_sub_sum(exact, maximum[row]);
        }
        keys.attend(block, exact, width, d, attended);
    }
}

/// The softmax part of one query token.
pub(crate) struct RowWeights<T> {
    /// Self-Saliency Score.
    pub score: T,
    /// `Σ e^{s − m}` over everything attended exactly.
    pub denominator: T,
    /// `m`
    pub maximum: T,
}

/// The larger one; NaN if the second is.
#[inline(always)]
fn larger<T: Real>(a: T, b: T) -> T {
    if a > b { a } else { b }
}

/// Adds the softmax over two runs of logits and the token's `own` to what their keys received; `max` is the largest logit.
#[inline(always)]
fn receive<T: Real>(a: (&[T], &mut [T]), b: (&[T], &mut [T]), own: T, max: T) {
    let weight = |&logit: &T| (logit - max).fast_exp();
    let sum = a.0.iter().chain(b.0).map(weight).sum::<T>() + weight(&own);
    for (logits, received) in [a, b] {
        for (received, logit) in received.iter_mut().zip(logits) {
            *received += weight(logit) / sum;
        }
    }
}

impl<T: Real> RowWeights<T> {
    /// Turns scaled logits into `e^{s − m}` in place, `m` the true maximum over what is attended, and scores the token.
    ///
    /// `local` holds the window's keys in order of position, the token's own last. `received` is added to with
    /// `Router::ReceivedAttention`, else it may be empty: what the keys before the token get of its softmax over `local`.
    #[inline(always)]
    pub fn new(
        local: &mut [T],
        salient: &mut [T],
        input: &HeadInput<'_, T>,
        received: &mut [T],
    ) -> Self {
        let last = local.len() - 1;
        let window_start = local.len() - local.len().min(input.chunk);
        let (before, window) = local.split_at_mut(window_start);
        let (others, own) = window.split_at_mut(last - window_start);
        let own = &mut own[0];

        let others_max = vector::max(others);
        let window_max = larger(others_max, *own);
        let attended =
            if input.branches.window { larger(vector::max(before), window_max) } else { *own };
        let m = larger(vector::max(salient), attended);

        let wants_score = input.router == Router::SelfSaliency;
        let receives = input.router == Router::ReceivedAttention;
        // The score may reuse e^{s − m} unless all of its window would vanish under that shift.
        let scored_max = match (receives, input.branches.window) {
            (false, _) => window_max,
            (true, true) => attended,
            (true, false) => larger(vector::max(before), window_max),
        };
        let reuse = input.branches.window && scored_max > m - T::of(60.0);
        let mut score = T::zero();
        if wants_score && !reuse {
            let others: T = others.iter().map(|&x| (x - window_max).fast_exp()).sum();
            let own = (*own - window_max).fast_exp();
            score = T::of(router::self_saliency(others.wide(), own.wide()));
        }

        if receives && !reuse {
            let (to_before, to_others) = received[..last].split_at_mut(window_start);
            receive((before, to_before), (others, to_others), *own, scored_max);
        }

        let mut denominator = vector::exp_sub_sum(salient, m);
        *own = (*own - m).fast_exp();
        if input.branches.window {
            let others = vector::exp_sub_sum(others, m);
            let before = vector::exp_sub_sum(before, m);
            denominator += before + others;
            if wants_score && reuse {
                score = T::of(router::self_saliency(others.wide(), own.wide()));
            }
            if receives && reuse {
                let inverse = T::one() / (before + others + local[last]);
                vector::axpy(&mut received[..last], inverse, &local[..last]);
            }
        } else {
            local[..last].fill(T::zero());
        }
        denominator += local[last];
        Self { score, denominator, maximum: m }
    }
}
