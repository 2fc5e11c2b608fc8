//! Chunk-wise forward pass of one selection head: training, prefill and decoding alike.

use std::ops::Range;

use rayon::prelude::*;
use smallvec::SmallVec;

use super::feature_map::{map_into, map_rows};
use super::head_state::{HeadState, Routing};
use super::key_store::TILE;
use super::linear_only;
use super::query_rows::{Buffers, Segment, query_rows};
use super::retirement::Gathered;
use super::rows::Rows;
use super::visible_keys::{Keys, Part, Salient};
use crate::config::{Branches, FeatureMap, Mode, Router};
use crate::router;
use still_compute::Real;
use still_compute::matmul::Mat;

/// Tokens of a segment from which its query heads are worth running on several threads.
pub(super) const PARALLEL_TOKENS: usize = 16;

/// One item per query head of a group: without an allocation for all usual groups.
pub(crate) type PerHead<A> = SmallVec<[A; 8]>;

/// The feature maps of one selection head, reflections folded in.
#[derive(Clone, Debug)]
pub(crate) struct FeatureMaps<'a, T> {
    pub map: FeatureMap,
    /// `W` of `φ_q`, `[D, F]`, by query head.
    pub q: PerHead<&'a [T]>,
    /// `W` of `φ_k`, `[D, F]`.
    pub k: &'a [T],
    pub feature_dim: usize,
}

impl<T: Real> FeatureMaps<'_, T> {
    /// Channels of `φ`.
    pub fn width(&self) -> usize {
        2 * self.feature_dim
    }

    /// `φ_k` of key rows of `head_dim` values.
    pub fn of_keys(&self, k: &[T], head_dim: usize) -> Vec<T> {
        let rows = k.len() / head_dim;
        map_rows(self.map, Mat::rows(k, head_dim), rows, self.k, self.feature_dim)
    }

    /// [`FeatureMaps::of_keys`] into `phi`, `[rows, 2F]`.
    pub fn of_keys_into(&self, k: &[T], head_dim: usize, phi: &mut [T]) {
        map_into(self.map, Mat::rows(k, head_dim), self.k, self.feature_dim, phi);
    }
}

/// What one selection head is fed in one call; its query heads are counted from 0.
#[derive(Clone, Debug)]
pub(crate) struct HeadInput<'a, T> {
    pub chunk: usize,
    pub head_dim: usize,
    pub layer: usize,
    pub mode: Mode,
    /// Index of the selection head (for the random router).
    pub head: usize,
    pub router: Router,
    pub branches: Branches,
    pub routing: Routing<'a>,
    pub q: PerHead<Rows<'a, T>>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    pub gate: Option<PerHead<Rows<'a, T>>>,
    pub features: FeatureMaps<'a, T>,
    /// `exp(ℓ)` per query head with `LinearNorm::Mean`, else the linear branch is summed.
    pub lambda: Option<&'a [T]>,
    /// `1 / sigmoid(w)` per query head with a window factor.
    pub against_window: Option<&'a [T]>,
    /// Whether a segment's query heads are run on several threads: worth it where there are few selection heads.
    pub split_heads: bool,
}

/// Whether so many selection heads are too few to keep every thread busy.
pub(crate) fn should_split_heads(selection_heads: usize) -> bool {
    let threads = rayon::current_num_threads();
    threads > 1 && selection_heads < 4 * threads
}

impl<T: Real> HeadInput<'_, T> {
    /// Scale of the linear branch of query head `head` over a state of `count` tokens.
    ///
    /// A factor on the exact terms is its inverse on the linear ones: numerator and denominator have both, and the
    /// denominator is still at least 1.
    pub fn linear_scale(&self, head: usize, count: usize) -> T {
        let scale =
            self.lambda.map_or(T::one(), |lambda| lambda[head] / T::of(count.max(1) as f64));
        self.against_window.map_or(scale, |inverse| scale * inverse[head])
    }

    /// Whether the scale of the linear branch is learned.
    pub fn learns_scale(&self) -> bool {
        self.lambda.is_some() || self.against_window.is_some()
    }

    pub fn logit_scale(&self) -> T {
        T::of(1.0 / (self.head_dim as f64).sqrt())
    }
}

/// What a call may be asked to tell beside its output.
#[derive(Debug, Default)]
pub(crate) struct Record<'a, T> {
    /// `Selection::absorbed_at` by absolute position.
    pub absorbed_at: Option<&'a mut [u32]>,
    /// Router score by token of the call; of those still in the window, by the tokens so far.
    pub scores: Option<&'a mut [T]>,
}

impl<T: Real> Record<'_, T> {
    /// Takes down the scores of `positions`, all of the window, in a call whose first token was at `first`.
    fn take_scores(
        &mut self,
        positions: Range<usize>,
        first: usize,
        state: &HeadState<T>,
        input: &HeadInput<'_, T>,
    ) {
        let Some(scores) = self.scores.as_deref_mut() else { return };
        for position in positions.start.max(first)..positions.end {
            scores[position - first] = state.score(position, input);
        }
    }
}

/// Memory that segments are worked in. A thread keeps one for all its heads: it then stays in that thread's cache.
#[derive(Clone, Debug)]
pub(crate) struct Scratch<T> {
    /// One for all query heads, or one for each.
    pub(super) buffers: Vec<Buffers<T>>,
    /// Widened rows: K and V of the previous chunk, the current one and the salient tokens.
    rows: [Vec<T>; 6],
    /// Salient keys with channels in pairs, where they are not widened.
    paired: Vec<[u32; TILE]>,
    /// What the query heads add to scores, by head: see [`query_rows`].
    scores: Vec<T>,
    gathered: Gathered<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            buffers: Vec::new(),
            rows: Default::default(),
            paired: Vec::new(),
            scores: Vec::new(),
            gathered: Gathered::default(),
        }
    }
}

/// Feeds `tokens` tokens; writes `[query heads, stride, D]` into `out`, of which the first `tokens` rows are set.
pub(crate) fn advance<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    tokens: usize,
    out: &mut [T],
    stride: usize,
    mut record: Record<'_, T>,
    scratch: &mut Scratch<T>,
) {
    if input.mode == Mode::LinearOnly {
        return linear_only::advance(state, input, tokens, out, stride, record, scratch);
    }
    let first = state.position;
    let mut done = 0;
    while done < tokens {
        let offset = state.position % input.chunk;
        let length = (input.chunk - offset).min(tokens - done);
        let now = state.position / input.chunk;
        if offset == 0 && now >= 2 {
            if input.router == Router::SelfRecall {
                state.score_by_recall(now - 2, input, &mut scratch.gathered);
            }
            record.take_scores(
                (now - 2) * input.chunk..(now - 1) * input.chunk,
                first,
                state,
                input,
            );
            let absorbed_at = record.absorbed_at.as_deref_mut();
            state.retire(now, input, absorbed_at, &mut scratch.gathered);
        }
        let segment = Segment { start: done, length, stride };
        feed(state, input, segment, out, scratch);
        state.position += length;
        done += length;
    }
    if tokens == 1 {
        state.prepare(input, &mut scratch.gathered);
    }
    let window = (state.position.saturating_sub(1) / input.chunk).saturating_sub(1) * input.chunk;
    record.take_scores(window..state.position, first, state, input);
}

/// Feeds the tokens of one segment: its rows and scores enter the ring.
fn feed<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    segment: Segment,
    out: &mut [T],
    scratch: &mut Scratch<T>,
) {
    let Segment { start, length, stride } = segment;
    let (chunk, head_dim) = (input.chunk, input.head_dim);
    let (now, offset) = (state.position / chunk, state.position % chunk);
    let current_half = now % 2 * chunk;
    let slot = current_half + offset;
    for i in 0..length {
        state.ring_k.set(slot + i, input.k.row(start + i));
        state.ring_v.set(slot + i, input.v.row(start + i));
    }

    let previous_half = (now + 1) % 2 * chunk;
    let previous_end = previous_half + if now > 0 { chunk } else { 0 };
    let salient_rows = if input.branches.salient { state.salient_k.len() } else { 0 };
    let group = input.q.len();
    let queries = group * length;
    let ring = (&state.ring_k, &state.ring_v);
    let salient = (&state.salient_k, &state.salient_v);
    let [a, b, c, d, e, f] = &mut scratch.rows;
    let keys = Keys {
        previous: Part::new(ring, previous_half..previous_end, queries, (a, b)),
        current: Part::new(ring, current_half..slot + length, queries, (c, d)),
        salient: Salient::new(salient, salient_rows, queries, (&mut scratch.paired, e, f)),
        state: (state.count > 0).then_some((state.s.as_slice(), state.z.as_slice())),
        count: state.count,
        offset,
    };

    // Of each query head: a score per query, or a sum per key.
    let per_head = match input.router {
        Router::ReceivedAttention => previous_end - previous_half + offset + length,
        Router::SelfSaliency
        | Router::SelfRecall
        | Router::FirstTokens
        | Router::Random { .. }
        | Router::None => length,
    };
    let split = input.split_heads && length >= PARALLEL_TOKENS;
    let heads = if split { 1 } else { group };
    scratch.buffers.resize_with(group.max(1), Buffers::default);
    scratch.scores.resize(group * per_head, T::nan());
    let answer = |index: usize, out: &mut [T], scores: &mut [T], buffers: &mut Buffers<T>| {
        let first = index * heads;
        T::vectorize(
            #[inline(always)]
            || query_rows(&keys, input, first..first + heads, segment, out, scores, buffers),
        );
    };
    let (block, part) = (heads * stride * head_dim, heads * per_head);
    if split {
        out.par_chunks_mut(block)
            .enumerate()
            .zip(scratch.scores.par_chunks_mut(part))
            .zip(&mut scratch.buffers)
            .for_each(|(((index, out), scores), buffers)| answer(index, out, scores, buffers));
    } else {
        out.chunks_mut(block)
            .enumerate()
            .zip(scratch.scores.chunks_mut(part))
            .zip(&mut scratch.buffers)
            .for_each(|(((index, out), scores), buffers)| answer(index, out, scores, buffers));
    }

    for (i, score) in state.ring_score[slot..slot + length].iter_mut().enumerate() {
        *score = match input.router {
            Router::SelfSaliency => {
                let heads = scratch.scores.iter().skip(i).step_by(length);
                heads.copied().sum::<T>() / T::of(group as f64)
            }
            // Sums that later queries add to, and scores of the time of retirement.
            Router::ReceivedAttention | Router::SelfRecall => T::zero(),
            Router::FirstTokens => T::of(router::first_tokens_score(state.position + i)),
            Router::Random { seed } => {
                let position = state.position + i;
                T::of(router::random_score(seed, input.layer, input.head, position))
            }
            Router::None => T::zero(),
        };
    }
    if input.router == Router::ReceivedAttention {
        let keys = (previous_half..previous_end).chain(current_half..slot + length);
        for received in scratch.scores.chunks_exact(per_head) {
            for (slot, &received) in keys.clone().zip(received) {
                state.ring_score[slot] += received;
            }
        }
    }
}
