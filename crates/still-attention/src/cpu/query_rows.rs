//! The queries of one segment: everything that they attend to, in a few matrix products.

use std::ops::Range;

use super::cells::round_to_bf16;
use super::feature_map::map_into;
use super::head_input::HeadInput;
use super::panels::Softmax;
use super::pieces::add_pieces;
use super::row_weights::RowWeights;
use super::visible_keys::{Keys, PanelScratch, Part, Salient, StoredPanels};
use super::weighted_sum::{SMALL_BATCH, matmul_small_batch};
use crate::config::Router;
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
    /// First row of each query head's output.
    pub to: usize,
    /// Rows from one query head's output to the next one's.
    pub stride: usize,
}

/// Salient keys that are attended to at a time: their logits and the keys and values themselves stay in a core's own cache,
/// however many there are.
const BLOCK: usize = 256;

/// Memory of [`query_rows`] and its like. Every buffer is written before it is read, so that what a call left may stay.
#[derive(Clone, Debug)]
pub(crate) struct Buffers<T> {
    pub(super) q: Vec<T>,
    lines: Vec<u32>,
    panels: PanelScratch<T>,
    pub(super) local: Vec<T>,
    pub(super) exact: Vec<T>,
    pub(super) attended: Vec<T>,
    pub(super) denominator: Vec<T>,
    pub(super) maximum: Vec<T>,
    pub(super) phi: Vec<T>,
    linear: Vec<T>,
}

impl<T> Default for Buffers<T> {
    fn default() -> Self {
        let new = Vec::new;
        Self {
            q: new(),
            lines: Vec::new(),
            panels: PanelScratch::default(),
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
    let d = input.head_dim;
    let rows = heads.len() * segment.length;
    let q = take(&mut buffers.q, rows * d);
    scale_queries(input, heads.clone(), segment, q);
    let mut sums = Softmax {
        attended: take(&mut buffers.attended, rows * d),
        denominator: take(&mut buffers.denominator, rows),
        maximum: take(&mut buffers.maximum, rows),
    };
    attend_window(keys, input, segment.length, q, &mut sums, scores, &mut buffers.local);
    match &keys.salient {
        Salient::Part { part, rounded } => {
            if *rounded {
                q.iter_mut().for_each(|x| *x = round_to_bf16(*x));
            }
            attend_salient(part, q, d, &mut sums, &mut buffers.exact);
        }
        Salient::Panels { keys, rounded } => {
            if *rounded {
                q.iter_mut().for_each(|x| *x = round_to_bf16(*x));
            }
            attend_panels(*keys, q, &mut sums, &mut buffers.panels, &mut buffers.lines);
        }
    }
    add_pieces(input.beforehand, d, &mut sums);
    if let (Some(state), true) = (keys.state, input.branches.linear) {
        let buffers = (&mut buffers.phi, &mut buffers.linear);
        add_linear(state, keys.count, input, heads, segment, &mut sums, buffers);
    }
    for (row, attended) in sums.attended.chunks_exact(d).enumerate() {
        let to = row / segment.length * segment.stride + segment.to + row % segment.length;
        let inverse = T::one() / sums.denominator[row];
        for (out, &x) in out[to * d..(to + 1) * d].iter_mut().zip(attended) {
            *out = x * inverse;
        }
    }
}

/// The queries times the logit scale, by query head: that costs less than to scale the logits.
#[inline(always)]
fn scale_queries<T: Real>(
    input: &HeadInput<'_, T>,
    heads: Range<usize>,
    Segment { start, length, .. }: Segment,
    to: &mut [T],
) {
    let scale = input.logit_scale;
    for (row, q) in to.chunks_exact_mut(input.head_dim).enumerate() {
        let (head, token) = (heads.start + row / length, start + row % length);
        for (q, &x) in q.iter_mut().zip(input.q[head].row(token)) {
            *q = x * scale;
        }
    }
}

/// Starts the softmax with the window, and scores the queries: see [`query_rows`].
#[inline(always)]
fn attend_window<T: Real>(
    keys: &Keys<'_, T>,
    input: &HeadInput<'_, T>,
    length: usize,
    q: &[T],
    sums: &mut Softmax<'_, T>,
    scores: &mut [T],
    local: &mut Vec<T>,
) {
    // Logits in order of position: [previous | current].
    let (d, rows) = (input.head_dim, sums.denominator.len());
    let previous = keys.previous.len(d);
    let width = previous + keys.current.len(d);
    let local = take(local, rows * width);
    keys.previous.logits(keys.previous.all(d), q, d, local, width);
    keys.current.logits(keys.current.all(d), q, d, &mut local[previous..], width);

    let receives = input.router == Router::ReceivedAttention;
    if receives {
        scores.fill(T::zero());
    }
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
        (sums.denominator[row], sums.maximum[row]) = (weights.denominator, weights.maximum);
    }
    sums.attended.fill(T::zero());
    keys.previous.attend(keys.previous.all(d), local, width, d, sums.attended);
    keys.current.attend(keys.current.all(d), &local[previous..], width, d, sums.attended);
}

/// Adds salient keys to the softmax of the queries `q` `[rows, D]`, a block at a time: a larger maximum shrinks what was
/// added before.
#[inline(always)]
pub(super) fn attend_salient<T: Real>(
    keys: &Part<'_, T>,
    q: &[T],
    d: usize,
    sums: &mut Softmax<'_, T>,
    exact: &mut Vec<T>,
) {
    let Softmax { attended, denominator, maximum } = sums;
    let (rows, salient) = (denominator.len(), keys.len(d));
    let exact = take(exact, rows * salient.min(BLOCK));
    for start in (0..salient).step_by(BLOCK) {
        let block = start..salient.min(start + BLOCK);
        let width = block.len();
        keys.logits(block.clone(), q, d, exact, width);
        for (row, exact) in exact.chunks_exact_mut(width).take(rows).enumerate() {
            let top = vector::softmax_shift(exact);
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

/// The same for keys in panels, of f32 queries.
fn attend_panels<T: Real>(
    keys: StoredPanels<'_, T>,
    q: &[T],
    sums: &mut Softmax<'_, T>,
    scratch: &mut PanelScratch<T>,
    lines: &mut Vec<u32>,
) {
    let rows = (T::as_f32s(q), T::as_f32s_mut(sums.attended));
    let of_rows = (T::as_f32s_mut(sums.denominator), T::as_f32s_mut(sums.maximum));
    let ((Some(q), Some(attended)), (Some(denominator), Some(maximum))) = (rows, of_rows) else {
        unreachable!("keys are in panels for f32 only");
    };
    for span in keys.spans() {
        let softmax = Softmax {
            attended: &mut *attended,
            denominator: &mut *denominator,
            maximum: &mut *maximum,
        };
        keys.read(span, scratch).attend(q, softmax, lines);
    }
}

/// Adds the linear terms, of a state `(S, z)` that has absorbed `count` tokens.
#[inline(always)]
fn add_linear<T: Real>(
    (s, z): (&[T], &[T]),
    count: usize,
    input: &HeadInput<'_, T>,
    heads: Range<usize>,
    Segment { start, length, .. }: Segment,
    sums: &mut Softmax<'_, T>,
    (phi, linear): (&mut Vec<T>, &mut Vec<T>),
) {
    let (d, features, rows) = (input.head_dim, z.len(), sums.denominator.len());
    let phi = take(phi, rows * features);
    for (head, phi) in heads.clone().zip(phi.chunks_exact_mut(length * features)) {
        let maps = &input.features;
        map_into(maps.map, input.q[head].mat(start), maps.q[head], maps.feature_dim, phi);
    }
    let linear = take(linear, rows * d);
    if rows <= SMALL_BATCH {
        matmul_small_batch((d, features), linear, d, false, (phi, features), s);
    } else {
        let phi = Mat::rows(phi, features);
        matmul((rows, d, features), linear, d, false, phi, Mat::rows(s, d));
    }
    for row in 0..rows {
        let (head, token) = (heads.start + row / length, start + row % length);
        let scale = input.linear_scale(head, count);
        sums.denominator[row] += scale * vector::dot(&phi[row * features..(row + 1) * features], z);
        let attended = &mut sums.attended[row * d..(row + 1) * d];
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
