//! Chunk-wise forward pass of one selection head: training, prefill and decoding alike.

use std::ops::Range;

use rayon::prelude::*;

use super::call::{PARALLEL_TOKENS, Record, Scratch};
use super::head_input::HeadInput;
use super::head_state::HeadState;
use super::linear_only;
use super::query_rows::{Buffers, Segment, query_rows};
use super::visible_keys::{Keys, Part, Salient};
use crate::config::{Mode, Router};
use crate::router;
use still_compute::Real;

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
    if tokens == 1 {
        scratch.retirement.reserve(state, input);
    }
    let first = state.position;
    let mut done = 0;
    while done < tokens {
        let offset = state.position % input.chunk;
        let length = (input.chunk - offset).min(tokens - done);
        let now = state.position / input.chunk;
        if offset == 0 && now >= 2 {
            if input.router == Router::SelfRecall {
                let gathered = &mut scratch.retirement.gathered;
                state.score_by_recall(now - 2, input, gathered);
            }
            record.take_scores(
                (now - 2) * input.chunk..(now - 1) * input.chunk,
                first,
                state,
                input,
            );
            let absorbed_at = record.absorbed_at.as_deref_mut();
            state.retire(now, input, absorbed_at, &mut scratch.retirement);
        }
        let segment = Segment { start: done, length, to: done, stride };
        feed(state, input, segment, out, scratch);
        state.position += length;
        done += length;
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
    let Segment { start, length, stride, .. } = segment;
    let (chunk, head_dim) = (input.chunk, input.head_dim);
    let (now, offset) = (state.position / chunk, state.position % chunk);
    let current_half = now % 2 * chunk;
    let slot = current_half + offset;
    state.grow_ring(length);
    for i in 0..length {
        state.ring_k.set(slot + i, input.k.row(start + i));
        state.ring_v.set(slot + i, input.v.row(start + i));
    }

    let previous = match now {
        // Its half of the ring need not be there.
        0 => 0..0,
        _ => (now + 1) % 2 * chunk..((now + 1) % 2 + 1) * chunk,
    };
    let seen = !input.branches.salient || !input.beforehand.is_empty();
    let salient_rows = if seen { 0 } else { state.salient_k.len() };
    let group = input.q.len();
    let queries = group * length;
    let ring = (&state.ring_k, &state.ring_v);
    let salient = (&state.salient_k, &state.salient_v);
    let [a, b, c, d, e, f] = &mut scratch.rows;
    let keys = Keys {
        previous: Part::new(ring, previous.clone(), queries, (a, b)),
        current: Part::new(ring, current_half..slot + length, queries, (c, d)),
        salient: Salient::new(salient, salient_rows, queries, (e, f)),
        state: (state.count > 0).then_some((state.s.as_slice(), state.z.as_slice())),
        count: state.count,
        offset,
    };

    // Of each query head: a score per query, or a sum per key.
    let per_head = match input.router {
        Router::ReceivedAttention => previous.len() + offset + length,
        _ => length,
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

    let keys = previous.chain(current_half..slot + length);
    enter_scores(state, input, slot..slot + length, keys, &scratch.scores);
}

/// A new token's score, from what each query head gives where the router asks queries.
pub(super) fn score_of<'a, T: Real>(
    input: &HeadInput<'_, T>,
    position: usize,
    by_head: impl Iterator<Item = &'a T>,
) -> T {
    match router::position_score(input.router, input.layer, input.head, position) {
        Some(score) => T::of(score),
        None if input.router == Router::SelfSaliency => {
            by_head.copied().sum::<T>() / T::of(input.q.len() as f64)
        }
        // Sums that later queries add to, and scores of the time of retirement.
        None if matches!(input.router, Router::ReceivedAttention | Router::SelfRecall) => T::zero(),
        None => {
            unreachable!("score_of in cpu/forward.rs gives no score of {}", input.router.name())
        }
    }
}

/// Writes the scores of new tokens to their `slots` of the ring; with `Router::ReceivedAttention` adds to those of the `keys`
/// that they attended to.
///
/// `scores`: what each query head gives, by query or by key.
fn enter_scores<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    slots: Range<usize>,
    keys: impl Iterator<Item = usize> + Clone,
    scores: &[T],
) {
    let (length, group) = (slots.len(), input.q.len());
    for (i, slot) in slots.enumerate() {
        let by_head = scores.iter().skip(i).step_by(length);
        state.ring_score[slot] = score_of(input, state.position + i, by_head.take(group));
    }
    if input.router == Router::ReceivedAttention {
        for received in scores.chunks_exact(keys.clone().count()) {
            for (slot, &received) in keys.clone().zip(received) {
                state.ring_score[slot] += received;
            }
        }
    }
}
