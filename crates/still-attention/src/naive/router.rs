//! The score that a router gives each token of a selection head. The highest wins.
//!
//! ```text
//! self_saliency, received_attention:   the mean over the group's query heads
//! self_recall:                         known when a chunk retires
//! first_tokens:                        −t
//! random:                              hash(seed, layer, head, t)
//! none:                                0; the budget is 0 too
//! ```

use super::head::Head;
use super::{received_attention, self_saliency};
use crate::config::Router;
use crate::router::random_score;

/// Scores of all tokens, `[N]`, as far as they do not depend on the linear state.
pub(super) fn scores(head: &Head<'_>) -> Vec<f64> {
    let tokens = head.input.tokens;
    match head.config.router {
        Router::SelfSaliency => mean_over_group(head, self_saliency),
        Router::ReceivedAttention => mean_over_group(head, received_attention),
        Router::FirstTokens => (0..tokens).map(|t| -(t as f64)).collect(),
        Router::Random { seed } => {
            (0..tokens).map(|t| random_score(seed, head.config.layer, head.index, t)).collect()
        }
        Router::SelfRecall | Router::None => vec![0.0; tokens],
    }
}

/// Of one query head: its queries, the keys, channels, the scale of logits, tokens of a chunk.
type Score = fn(&[f64], &[f64], usize, f64, usize) -> Vec<f64>;

/// A score of one query head, averaged over the group.
fn mean_over_group(head: &Head<'_>, score: Score) -> Vec<f64> {
    let group = head.query_heads().len() as f64;
    let mut mean = vec![0.0; head.input.tokens];
    for h in head.query_heads() {
        let (d, scale) = (head.input.geometry.head_dim, head.logit_scale());
        let of_head = score(head.queries(h), head.keys(), d, scale, head.config.chunk);
        mean.iter_mut().zip(of_head).for_each(|(mean, score)| *mean += score / group);
    }
    mean
}

/// Salient tokens that each retired chunk may leave.
pub(super) fn budget(head: &Head<'_>) -> usize {
    if head.config.router == Router::None { 0 } else { head.config.budgets[head.index] }
}
