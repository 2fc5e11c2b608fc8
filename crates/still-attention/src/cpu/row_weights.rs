//! The softmax of one query token over its window, and the token's score.

use super::head_input::HeadInput;
use crate::config::Router;
use crate::router;
use still_compute::Real;
use still_compute::vector;

/// The softmax part of one query token.
pub(crate) struct RowWeights<T> {
    /// Self-Saliency Score.
    pub score: T,
    /// `Σ e^{s − m}` over everything attended exactly.
    pub denominator: T,
    /// `m`
    pub maximum: T,
}

/// The larger one; the first if the second is NaN, as [`vector::softmax_shift`] would say of both.
#[inline(always)]
fn larger<T: Real>(a: T, b: T) -> T {
    if b > a { b } else { a }
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

        let others_max = vector::softmax_shift(others);
        let window_max = larger(others_max, *own);
        let attended = if input.branches.window {
            larger(vector::softmax_shift(before), window_max)
        } else {
            *own
        };
        let m = larger(vector::softmax_shift(salient), attended);

        let wants_score = input.router == Router::SelfSaliency;
        let receives = input.router == Router::ReceivedAttention;
        // The score may reuse e^{s − m} unless all of its window would vanish under that shift.
        let scored_max = match (receives, input.branches.window) {
            (false, _) => window_max,
            (true, true) => attended,
            (true, false) => larger(vector::softmax_shift(before), window_max),
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
