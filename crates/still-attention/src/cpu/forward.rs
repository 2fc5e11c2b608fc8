//! Chunk-wise forward pass of one selection head: training, prefill and decoding alike.

use rayon::prelude::*;

use super::feature_map::map_rows;
use super::head_state::{HeadState, Routing};
use super::linalg::{Mat, matmul};
use super::rows::Rows;
use crate::config::{Branches, FeatureMap, Router};
use crate::real::Real;
use crate::{router, vector};

/// Tokens of a segment from which its query heads are worth running on several threads.
const PARALLEL_TOKENS: usize = 16;

/// Where `φ_q` and `φ_k` come from.
#[derive(Clone, Debug)]
pub(crate) enum Features<'a, T> {
    /// Computed before (training, where they need gradients): rows by token of the call.
    Given { q: Vec<Rows<'a, T>>, k: Rows<'a, T>, width: usize },
    /// Computed here from `W`, `[D, F]` each (inference).
    Map { map: FeatureMap, q: Vec<&'a [T]>, k: &'a [T], feature_dim: usize },
}

impl<T: Real> Features<'_, T> {
    /// Channels of `φ`.
    pub fn width(&self) -> usize {
        match self {
            Self::Given { width, .. } => *width,
            Self::Map { feature_dim, .. } => 2 * feature_dim,
        }
    }

    /// `φ_k` of the tokens at `positions`, whose key rows are `k`.
    pub fn of_keys(&self, positions: &[u32], k: &[T]) -> Vec<T> {
        match self {
            Self::Given { k, .. } => {
                positions.iter().flat_map(|&p| k.row(p as usize).iter().copied()).collect()
            }
            Self::Map { map, k: w, feature_dim, .. } => {
                let head_dim = w.len() / feature_dim;
                map_rows(*map, Mat::rows(k, head_dim), positions.len(), w, *feature_dim)
            }
        }
    }

    /// `φ_q` of query head `head`'s tokens `start..start + tokens` of the call.
    fn of_queries(&self, head: usize, q: Rows<'_, T>, start: usize, tokens: usize) -> Vec<T> {
        match self {
            Self::Given { q, .. } => {
                (start..start + tokens).flat_map(|t| q[head].row(t).iter().copied()).collect()
            }
            Self::Map { map, q: w, feature_dim, .. } => {
                map_rows(*map, q.mat(start), tokens, w[head], *feature_dim)
            }
        }
    }
}

/// What one selection head is fed in one call; its query heads are counted from 0.
#[derive(Clone, Debug)]
pub(crate) struct HeadInput<'a, T> {
    pub chunk: usize,
    pub head_dim: usize,
    pub layer: usize,
    /// Index of the selection head (for the random router).
    pub head: usize,
    pub router: Router,
    pub branches: Branches,
    pub routing: Routing<'a>,
    pub q: Vec<Rows<'a, T>>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    pub gate: Option<Vec<Rows<'a, T>>>,
    pub features: Features<'a, T>,
    /// `exp(ℓ)` per query head with `LinearNorm::Mean`, else the linear branch is summed.
    pub lambda: Option<&'a [T]>,
    /// Whether a segment's query heads are run on several threads: worth it where there are few selection heads.
    pub split_heads: bool,
}

/// Whether so many selection heads are too few to keep every thread busy.
pub(crate) fn few(selection_heads: usize) -> bool {
    selection_heads < 4 * rayon::current_num_threads()
}

impl<T: Real> HeadInput<'_, T> {
    /// Scale of the linear branch of query head `head` over a state of `count` tokens.
    pub fn linear_scale(&self, head: usize, count: usize) -> T {
        self.lambda.map_or(T::one(), |lambda| lambda[head] / T::of(count.max(1) as f64))
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
    /// Router score by token of the call.
    pub scores: Option<&'a mut [T]>,
}

/// Feeds `tokens` tokens; writes `[query heads, stride, D]` into `out`, of which the first `tokens` rows are set.
pub(crate) fn advance<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    tokens: usize,
    out: &mut [T],
    stride: usize,
    mut record: Record<'_, T>,
) {
    let mut done = 0;
    while done < tokens {
        let offset = state.position % input.chunk;
        let length = (input.chunk - offset).min(tokens - done);
        let now = state.position / input.chunk;
        if offset == 0 && now >= 2 {
            state.retire(now, input, record.absorbed_at.as_deref_mut());
        }
        let scores = segment(state, input, done, length, out, stride);
        if let Some(all) = record.scores.as_deref_mut() {
            all[done..done + length].copy_from_slice(&scores);
        }
        state.position += length;
        done += length;
    }
}

/// The keys that one segment's queries see, widened to the kernel's type.
struct Keys<'a, T> {
    previous: (&'a [T], &'a [T]),
    current: (&'a [T], &'a [T]),
    salient: (&'a [T], &'a [T]),
    state: Option<(&'a [T], &'a [T])>,
    count: usize,
    /// Tokens of the current chunk that came before this segment.
    offset: usize,
}

/// `length` tokens of one chunk; returns their router scores.
fn segment<T: Real>(
    state: &mut HeadState<T>,
    input: &HeadInput<'_, T>,
    start: usize,
    length: usize,
    out: &mut [T],
    stride: usize,
) -> Vec<T> {
    let (chunk, head_dim) = (input.chunk, input.head_dim);
    let (now, offset) = (state.position / chunk, state.position % chunk);
    let current_half = now % 2 * chunk;
    for i in 0..length {
        state.ring_k.set(current_half + offset + i, input.k.row(start + i));
        state.ring_v.set(current_half + offset + i, input.v.row(start + i));
    }

    let (mut a, mut b, mut c, mut d) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut e, mut f) = (Vec::new(), Vec::new());
    let previous_half = (now + 1) % 2 * chunk;
    let previous_end = previous_half + if now > 0 { chunk } else { 0 };
    let current_end = current_half + offset + length;
    let salient_rows = if input.branches.salient { state.salient_k.len() } else { 0 };
    let keys = Keys {
        previous: (
            state.ring_k.read(previous_half, previous_end, &mut a),
            state.ring_v.read(previous_half, previous_end, &mut b),
        ),
        current: (
            state.ring_k.read(current_half, current_end, &mut c),
            state.ring_v.read(current_half, current_end, &mut d),
        ),
        salient: (
            state.salient_k.read(0, salient_rows, &mut e),
            state.salient_v.read(0, salient_rows, &mut f),
        ),
        state: (state.count > 0).then_some((state.s.as_slice(), state.z.as_slice())),
        count: state.count,
        offset,
    };

    let group = input.q.len();
    let run = |(head, out): (usize, &mut [T])| {
        let rows = &mut out[start * head_dim..(start + length) * head_dim];
        query_head(&keys, input, head, start, length, rows)
    };
    let per_head: Vec<Vec<T>> = if input.split_heads && length >= PARALLEL_TOKENS && group > 1 {
        out.par_chunks_mut(stride * head_dim).enumerate().map(run).collect()
    } else {
        out.chunks_mut(stride * head_dim).enumerate().map(run).collect()
    };

    let scores: Vec<T> = match input.router {
        Router::SelfSaliency => (0..length)
            .map(|i| per_head.iter().map(|s| s[i]).sum::<T>() / T::of(group as f64))
            .collect(),
        Router::Random { seed } => (0..length)
            .map(|i| {
                let position = state.position + i;
                T::of(router::random_score(seed, input.layer, input.head, position))
            })
            .collect(),
        Router::None => vec![T::zero(); length],
    };
    let slot = current_half + offset;
    state.ring_score[slot..slot + length].copy_from_slice(&scores);
    scores
}

/// One query head's rows of a segment; returns the Self-Saliency Score of each token.
fn query_head<T: Real>(
    keys: &Keys<'_, T>,
    input: &HeadInput<'_, T>,
    head: usize,
    start: usize,
    length: usize,
    out: &mut [T],
) -> Vec<T> {
    let d = input.head_dim;
    // Scaling the queries costs less than scaling the logits.
    let scale = input.logit_scale();
    let q: Vec<T> = (start..start + length)
        .flat_map(|t| input.q[head].row(t).iter().map(move |&x| x * scale))
        .collect();
    let q = Mat::rows(&q, d);
    let product = |rows: &[T], to: &mut [T], stride: usize| {
        matmul((length, rows.len() / d, d), to, stride, false, q, Mat::rows(rows, d).t());
    };

    // Logits against the window, in order of position: [previous | current].
    let previous = keys.previous.0.len() / d;
    let width = previous + keys.current.0.len() / d;
    let mut local = vec![T::nan(); length * width];
    product(keys.previous.0, &mut local, width);
    product(keys.current.0, &mut local[previous..], width);
    let salient = keys.salient.0.len() / d;
    let mut exact = vec![T::nan(); length * salient];
    if salient > 0 {
        product(keys.salient.0, &mut exact, salient);
    }

    let mut scores = vec![T::zero(); length];
    let mut denominator = vec![T::zero(); length];
    for i in 0..length {
        let row = &mut local[i * width..(i + 1) * width];
        let exact = &mut exact[i * salient..(i + 1) * salient];
        let visible = previous + keys.offset + i + 1;
        row[visible..].fill(T::zero());
        let weights = RowWeights::new(&mut row[..visible], exact, input);
        scores[i] = weights.score;
        denominator[i] = weights.denominator;
    }

    out.fill(T::zero());
    let mut add = |weights: &[T], stride: usize, rows: usize, v: &[T]| {
        matmul((length, d, rows), out, d, true, Mat::rows(weights, stride), Mat::rows(v, d));
    };
    if previous > 0 {
        add(&local, width, previous, keys.previous.1);
    }
    add(&local[previous..], width, width - previous, keys.current.1);
    if salient > 0 {
        add(&exact, salient, salient, keys.salient.1);
    }

    if let (Some((s, z)), true) = (keys.state, input.branches.linear) {
        let features = z.len();
        let phi = input.features.of_queries(head, input.q[head], start, length);
        let mut linear = vec![T::nan(); length * d];
        matmul(
            (length, d, features),
            &mut linear,
            d,
            false,
            Mat::rows(&phi, features),
            Mat::rows(s, d),
        );
        let scale = input.linear_scale(head, keys.count);
        for i in 0..length {
            denominator[i] += scale * vector::dot(&phi[i * features..(i + 1) * features], z);
            let (out, linear) = (&mut out[i * d..(i + 1) * d], &linear[i * d..(i + 1) * d]);
            match &input.gate {
                Some(gate) => {
                    for ((out, &linear), &gate) in
                        out.iter_mut().zip(linear).zip(gate[head].row(start + i))
                    {
                        *out += scale * gate * linear;
                    }
                }
                None => vector::axpy(out, scale, linear),
            }
        }
    }
    for (out, &denominator) in out.chunks_exact_mut(d).zip(&denominator) {
        let inverse = T::one() / denominator;
        out.iter_mut().for_each(|x| *x *= inverse);
    }
    scores
}

/// The softmax part of one query token.
pub(crate) struct RowWeights<T> {
    /// Self-Saliency Score.
    pub score: T,
    /// `Σ e^{s − m}` over everything attended exactly.
    pub denominator: T,
}

impl<T: Real> RowWeights<T> {
    /// Turns scaled logits into `e^{s − m}` in place, `m` the true maximum over what is attended, and scores the token.
    ///
    /// `local` holds the window's keys in order of position, the token's own last.
    pub fn new(local: &mut [T], salient: &mut [T], input: &HeadInput<'_, T>) -> Self {
        let last = local.len() - 1;
        let own = local[last];
        let window_start = local.len() - local.len().min(input.chunk);
        let others_max = vector::max(&local[window_start..last]);
        let window_max = if others_max > own { others_max } else { own };

        let attended = if input.branches.window { vector::max(local) } else { own };
        let salient_max = vector::max(salient);
        let m = if salient_max > attended { salient_max } else { attended };

        let wants_score = input.router == Router::SelfSaliency;
        // The score may reuse e^{s − m} unless all of its window would vanish under that shift.
        let reuse = input.branches.window && window_max > m - T::of(60.0);
        let mut score = T::zero();
        if wants_score && !reuse {
            let others: T =
                local[window_start..last].iter().map(|&x| (x - window_max).fast_exp()).sum();
            let own = (own - window_max).fast_exp();
            score = T::of(router::self_saliency(others.wide(), own.wide()));
        }

        let mut denominator = vector::exp_sub_sum(salient, m);
        if input.branches.window {
            denominator += vector::exp_sub_sum(local, m);
        } else {
            local[..last].fill(T::zero());
            local[last] = (own - m).fast_exp();
            denominator += local[last];
        }
        if wants_score && reuse {
            let others = vector::sum(&local[window_start..last]);
            score = T::of(router::self_saliency(others.wide(), local[last].wide()));
        }
        Self { score, denominator }
    }
}
