//! Attention to a window of the last tokens, of whole sequences, forward and backward: blocks of queries, each with all keys that
//! any of them sees.

use std::ops::Range;

use rayon::prelude::*;
use still_compute::Real;
use still_compute::matmul::{Mat, matmul};
use still_compute::vector;

use crate::HeadGeometry;

/// Query rows answered together.
const BLOCK: usize = 64;

/// What an operand's slices hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub geometry: HeadGeometry,
    pub tokens: usize,
    /// Tokens that are attended to, the token's own among them.
    pub window: usize,
    /// What `q·k` is multiplied by in logits.
    pub logit_scale: f64,
}

impl Sizes {
    /// The keys that some query of a block sees.
    fn keys(&self, queries: &Range<usize>) -> Range<usize> {
        (queries.start + 1).saturating_sub(self.window)..queries.end
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let tokens = self.tokens;
        (0..tokens).step_by(BLOCK).map(move |start| start..tokens.min(start + BLOCK))
    }

    fn scale<T: Real>(&self) -> T {
        T::of(self.logit_scale)
    }

    /// Weights `[queries, keys]` of a block's scaled queries, over what `weights` held; what is not seen weighs 0.
    #[inline(always)]
    fn weights<T: Real>(&self, queries: &Range<usize>, q: &[T], k: &[T], weights: &mut Vec<T>) {
        let (d, keys) = (self.geometry.head_dim, self.keys(queries));
        let width = keys.len();
        weights.resize(queries.len() * width, T::nan());
        let keys_t = Mat::rows(&k[keys.start * d..], d).t();
        matmul((queries.len(), width, d), weights, width, false, Mat::rows(q, d), keys_t);
        for (query, row) in queries.clone().zip(weights.chunks_exact_mut(width)) {
            let first = (query + 1).saturating_sub(self.window) - keys.start;
            let (seen, future) = row.split_at_mut(query + 1 - keys.start);
            let (past, seen) = seen.split_at_mut(first);
            past.fill(T::zero());
            future.fill(T::zero());
            vector::softmax(seen);
        }
    }
}

/// `[B, H, N, D]` of `q` `[B, H, N, D]`, `k` and `v` `[B, K, N, D]`.
pub(crate) fn forward<T: Real>(q: &[T], k: &[T], v: &[T], sizes: Sizes) -> Vec<T> {
    let d = sizes.geometry.head_dim;
    let head = sizes.tokens * d;
    let group = sizes.geometry.group();
    let mut out = vec![T::nan(); q.len()];
    out.par_chunks_mut(head.max(1)).enumerate().for_each(|(n, out)| {
        // Query heads of all sequences in order share KV heads of all sequences in order.
        let kv = n / group * head..(n / group + 1) * head;
        let (q, k, v) = (&q[n * head..(n + 1) * head], &k[kv.clone()], &v[kv]);
        let (mut scaled, mut weights) = (Vec::new(), Vec::new());
        for queries in sizes.blocks() {
            T::vectorize(
                #[inline(always)]
                || {
                    let rows = queries.start * d..queries.end * d;
                    scaled.clear();
                    scaled.extend(q[rows.clone()].iter().map(|&x| x * sizes.scale()));
                    sizes.weights(&queries, &scaled, k, &mut weights);
                    let keys = sizes.keys(&queries);
                    let values = Mat::rows(&v[keys.start * d..], d);
                    let weights = Mat::rows(&weights, keys.len());
                    let shape = (queries.len(), d, keys.len());
                    matmul(shape, &mut out[rows], d, false, weights, values);
                },
            );
        }
    });
    out
}

/// Gradients of `q`, `k` and `v` in [`forward`].
pub(crate) fn backward<T: Real>(
    q: &[T],
    k: &[T],
    v: &[T],
    d_out: &[T],
    sizes: Sizes,
) -> [Vec<T>; 3] {
    let head = sizes.tokens * sizes.geometry.head_dim;
    let queries = sizes.geometry.group() * head;
    let mut grads = [vec![T::nan(); q.len()], vec![T::zero(); k.len()], vec![T::zero(); v.len()]];
    let [dq, dk, dv] = &mut grads;
    let heads = dq.par_chunks_mut(queries.max(1)).zip(dk.par_chunks_mut(head.max(1)));
    heads.zip(dv.par_chunks_mut(head.max(1))).enumerate().for_each(|(n, ((dq, dk), dv))| {
        let (of_group, of_head) = (n * queries..(n + 1) * queries, n * head..(n + 1) * head);
        let (q, d_out) = (&q[of_group.clone()], &d_out[of_group]);
        let (k, v) = (&k[of_head.clone()], &v[of_head]);
        let group = q.chunks_exact(head.max(1)).zip(d_out.chunks_exact(head.max(1)));
        for ((q, d_out), dq) in group.zip(dq.chunks_exact_mut(head.max(1))) {
            let mut scratch = Scratch::default();
            for block in sizes.blocks() {
                T::vectorize(
                    #[inline(always)]
                    || pull_back(&sizes, block, [q, k, v, d_out], [dq, dk, dv], &mut scratch),
                );
            }
        }
    });
    grads
}

#[derive(Default)]
struct Scratch<T> {
    scaled: Vec<T>,
    weights: Vec<T>,
    d_logits: Vec<T>,
}

/// Gradients through one block of one head's queries: those of the queries are written, of keys and values added.
#[inline(always)]
fn pull_back<T: Real>(
    sizes: &Sizes,
    queries: Range<usize>,
    [q, k, v, d_out]: [&[T]; 4],
    [dq, dk, dv]: [&mut [T]; 3],
    Scratch { scaled, weights, d_logits }: &mut Scratch<T>,
) {
    let d = sizes.geometry.head_dim;
    let (rows, keys) = (queries.start * d..queries.end * d, sizes.keys(&queries));
    let (count, width, start) = (queries.len(), keys.len(), keys.start * d);
    scaled.clear();
    scaled.extend(q[rows.clone()].iter().map(|&x| x * sizes.scale()));
    sizes.weights(&queries, scaled, k, weights);

    let d_rows = Mat::rows(&d_out[rows.clone()], d);
    d_logits.resize(count * width, T::nan());
    matmul((count, width, d), d_logits, width, false, d_rows, Mat::rows(&v[start..], d).t());
    for (d_row, row) in d_logits.chunks_exact_mut(width).zip(weights.chunks_exact(width)) {
        let along = vector::dot(d_row, row);
        for (d, &weight) in d_row.iter_mut().zip(row) {
            *d = weight * (*d - along);
        }
    }
    let (weights, d_logits) = (Mat::rows(weights, width), Mat::rows(d_logits, width));
    matmul((width, d, count), &mut dv[start..], d, true, weights.t(), d_rows);
    matmul((width, d, count), &mut dk[start..], d, true, d_logits.t(), Mat::rows(scaled, d));
    matmul((count, d, width), &mut dq[rows.clone()], d, false, d_logits, Mat::rows(&k[start..], d));
    dq[rows].iter_mut().for_each(|x| *x *= sizes.scale());
}
