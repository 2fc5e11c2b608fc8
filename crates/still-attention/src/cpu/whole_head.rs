//! A head that keeps every token: causal softmax attention, whose chunks need not wait for each other, and the tokens' scores.

use std::ops::Range;

use rayon::prelude::*;

use super::call::Scratch;
use super::forward::score_of;
use super::head_input::{HeadInput, Routing};
use super::key_store::KeyStore;
use super::query_rows::{Segment, query_rows, take};
use super::rows::RowStore;
use super::visible_keys::{Keys, Part, Salient};
use crate::config::{Mode, Router, RowDtype};
use crate::selection::Selection;
use still_compute::Real;

/// Whether every token of a head stays exact, and its score depends on no other chunk's queries and on no linear state.
pub(crate) fn is_whole<T: Real>(input: &HeadInput<'_, T>) -> bool {
    let keeps = match input.routing {
        Routing::Scores { budget, cap } => budget == input.chunk && cap.is_none(),
        Routing::Given(absorbed_at) => absorbed_at.iter().all(|&at| at == Selection::NEVER),
    };
    let alone = !matches!(input.router, Router::ReceivedAttention | Router::SelfRecall);
    keeps && alone && input.mode == Mode::Hybrid
}

/// Attends from the first token on: `out` is `[query heads, tokens, D]`, `scores` `[tokens]`.
pub(crate) fn forward<T: Real>(input: &HeadInput<'_, T>, out: &mut [T], scores: &mut [T]) {
    let (tokens, d, chunk) = (scores.len(), input.head_dim, input.chunk);
    let (mut k, mut v) = (KeyStore::new(d, RowDtype::F32), RowStore::new(d, RowDtype::F32));
    k.reserve(tokens);
    v.reserve(tokens);
    for token in 0..tokens {
        k.push(input.k.row(token));
        v.push(input.v.row(token));
    }
    // A chunk's rows of every query head.
    let mut outs: Vec<Vec<&mut [T]>> = Vec::new();
    outs.resize_with(tokens.div_ceil(chunk), Vec::new);
    for head in out.chunks_mut(tokens * d) {
        for (outs, rows) in outs.iter_mut().zip(head.chunks_mut(chunk * d)) {
            outs.push(rows);
        }
    }
    let chunks = outs.into_par_iter().zip(scores.par_chunks_mut(chunk)).enumerate();
    // The later a chunk, the more it has to do: shares of one chunk can be taken over.
    chunks.with_max_len(1).for_each_init(Scratch::default, |scratch, (now, (outs, scores))| {
        let tokens = now * chunk..now * chunk + scores.len();
        attend(input, (&k, &v), tokens, outs, scores, scratch);
    });
}

/// Attends with the tokens of one chunk.
fn attend<T: Real>(
    input: &HeadInput<'_, T>,
    rows: (&KeyStore<T>, &RowStore<T>),
    tokens: Range<usize>,
    outs: Vec<&mut [T]>,
    scores: &mut [T],
    scratch: &mut Scratch<T>,
) {
    let (group, length, d) = (outs.len(), tokens.len(), input.head_dim);
    let before = tokens.start.saturating_sub(input.chunk);
    let queries = group * length;
    let Scratch { buffers, rows: [a, b, c, e, f, g], scores: by_head, .. } = scratch;
    let salient = if input.branches.salient { before } else { 0 };
    let keys = Keys {
        previous: Part::new(rows, before..tokens.start, queries, (a, b)),
        current: Part::new(rows, tokens.clone(), queries, (c, e)),
        salient: Salient::new(rows, salient, queries, (f, g)),
        state: None,
        count: 0,
        offset: 0,
    };
    buffers.resize_with(2, Default::default);
    let [buffers, out] = buffers.as_mut_slice() else { unreachable!("there are two") };
    let out = take(&mut out.attended, queries * d);
    let by_head = take(by_head, queries);
    let segment = Segment { start: tokens.start, length, to: 0, stride: length };
    T::vectorize(
        #[inline(always)]
        || query_rows(&keys, input, 0..group, segment, out, by_head, buffers),
    );
    for (to, rows) in outs.into_iter().zip(out.chunks_exact(length * d)) {
        to.copy_from_slice(rows);
    }
    for (i, score) in scores.iter_mut().enumerate() {
        *score = score_of(input, tokens.start + i, by_head[i..].iter().step_by(length));
    }
}
