//! Linear attention and nothing else: `o_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t`, every token up to `t` in the state.
//!
//! Blocks of tokens: within one, a masked product `φ_q φ_kᵀ`; what came before it through the state.

use std::ops::Range;

use rayon::prelude::*;

use super::call::{PARALLEL_TOKENS, Record, Scratch};
use super::feature_map::{map_into, map_rows};
use super::head_input::HeadInput;
use super::head_state::HeadState;
use super::query_rows::{Buffers, Segment, take};
use crate::config::MIN_DENOMINATOR;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

/// As [`super::forward::advance`]. Where a call ends makes no difference: its tokens are all in the state.
pub(crate) fn advance<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    tokens: usize,
    out: &mut [T],
    stride: usize,
    record: Record<'_, T>,
    scratch: &mut Scratch<T>,
) {
    if let Some(absorbed_at) = record.absorbed_at {
        for position in state.position..state.position + tokens {
            absorbed_at[position] = (position / input.chunk) as u32;
        }
    }
    if let Some(scores) = record.scores {
        scores.fill(T::zero());
    }
    if state.s.is_empty() && tokens > 0 {
        state.s = vec![T::zero(); input.features.width() * input.head_dim];
        state.z = vec![T::zero(); input.features.width()];
    }
    for start in (0..tokens).step_by(input.chunk) {
        let length = input.chunk.min(tokens - start);
        let segment = Segment { start, length, to: start, stride };
        feed(state, input, segment, out, scratch);
    }
    state.position += tokens;
    state.count += tokens;
}

/// Answers the queries of a block, then takes its keys and values into the state.
fn feed<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    segment: Segment,
    out: &mut [T],
    scratch: &mut Scratch<T>,
) {
    let Segment { start, length, stride, .. } = segment;
    let (features, d) = (input.features.width(), input.head_dim);
    let maps = &input.features;
    let phi_k = map_rows(maps.map, input.k.mat(start), length, maps.k, maps.feature_dim);

    let split = input.split_heads && length >= PARALLEL_TOKENS;
    let heads = if split { 1 } else { input.q.len() };
    scratch.buffers.resize_with(input.q.len().max(1), Buffers::default);
    let before = (state.s.as_slice(), state.z.as_slice());
    let answer = |((index, out), buffers): ((usize, &mut [T]), &mut Buffers<T>)| {
        let heads = index * heads..(index + 1) * heads;
        T::vectorize(
            #[inline(always)]
            || rows(before, &phi_k, input, heads, segment, out, buffers),
        );
    };
    let block = heads * stride * d;
    if split {
        out.par_chunks_mut(block).enumerate().zip(&mut scratch.buffers).for_each(answer);
    } else {
        out.chunks_mut(block).enumerate().zip(&mut scratch.buffers).for_each(answer);
    }

    absorb((&mut state.s, &mut state.z), &phi_k, input.v.mat(start), (features, d));
}

/// `S += φ(k) vᵀ`, `z += φ(k)` for each row of `phi_k`.
pub(crate) fn absorb<T: Real>(
    (s, z): (&mut [T], &mut [T]),
    phi_k: &[T],
    v: Mat<'_, T>,
    (features, d): (usize, usize),
) {
    let rows = phi_k.len() / features;
    matmul((features, d, rows), s, d, true, Mat::rows(phi_k, features).t(), v);
    phi_k.chunks_exact(features).for_each(|phi| vector::axpy(z, T::one(), phi));
}

/// The block's rows of the query heads `heads`, stacked; `out` is `[heads, stride, D]`.
#[inline(always)]
fn rows<T: Real>(
    (s, z): (&[T], &[T]),
    phi_k: &[T],
    input: &HeadInput<'_, T>,
    heads: Range<usize>,
    segment: Segment,
    out: &mut [T],
    buffers: &mut Buffers<T>,
) {
    let Segment { start, length, stride, .. } = segment;
    let (features, d) = (z.len(), input.head_dim);
    let rows = heads.len() * length;
    let phi = take(&mut buffers.phi, rows * features);
    for (head, phi) in heads.zip(phi.chunks_exact_mut(length * features)) {
        let maps = &input.features;
        map_into(maps.map, input.q[head].mat(start), maps.q[head], maps.feature_dim, phi);
    }
    let weights = take(&mut buffers.local, rows * length);
    let denominator = take(&mut buffers.denominator, rows);
    block_weights(phi, phi_k, z, weights, denominator);

    let attended = take(&mut buffers.attended, rows * d);
    matmul((rows, d, features), attended, d, false, Mat::rows(phi, features), Mat::rows(s, d));
    let v = input.v.mat(start);
    matmul((rows, d, length), attended, d, true, Mat::rows(weights, length), v);
    for (row, attended) in attended.chunks_exact(d).enumerate() {
        let to = (row / length * stride + start + row % length) * d;
        let inverse = at_least(denominator[row]).recip();
        for (out, &x) in out[to..to + d].iter_mut().zip(attended) {
            *out = x * inverse;
        }
    }
}

/// `φ(q)ᵀφ(k)` of a block's queries, stacked by head, to its keys up to each, and `φ(q)ᵀz_t`, not yet bounded.
#[inline(always)]
pub(crate) fn block_weights<T: Real>(
    phi: &[T],
    phi_k: &[T],
    z: &[T],
    weights: &mut [T],
    denominator: &mut [T],
) {
    let (rows, features) = (denominator.len(), z.len());
    let length = phi_k.len() / features;
    let keys = Mat::rows(phi_k, features).t();
    matmul((rows, length, features), weights, length, false, Mat::rows(phi, features), keys);
    for (row, weights) in weights.chunks_exact_mut(length).enumerate() {
        let (visible, future) = weights.split_at_mut(row % length + 1);
        future.fill(T::zero());
        let phi = &phi[row * features..(row + 1) * features];
        denominator[row] = vector::sum(visible) + vector::dot(phi, z);
    }
}

/// The denominator that is divided by; NaN if it is.
#[inline(always)]
pub(crate) fn at_least<T: Real>(denominator: T) -> T {
    let least = T::of(MIN_DENOMINATOR);
    if denominator < least { least } else { denominator }
}
