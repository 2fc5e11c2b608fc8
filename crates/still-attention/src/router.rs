//! Scores and selection: which tokens of a retiring chunk stay exact.

use std::cmp::Ordering;

use crate::config::{HybridConfig, Router};
use still_compute::Real;
use still_compute::random::uniform;

/// `ε` of the Self-Saliency Score.
pub const SALIENCY_EPSILON: f64 = 1e-8;

/// Self-Saliency Score from the closed form (method, "One layer, one head").
///
/// `others` is `Σ e^{s_tj − shift}` over the window without `t`, `own` is `e^{s_tt − shift}`, for any one `shift`.
/// Equals `Σ_j a_j ln((a_j+ε)/(b_j+ε))` within 1e-6.
pub fn self_saliency(others: f64, own: f64) -> f64 {
    let total = others + own;
    let (p, r) = (own / total, others / total);
    let entropy = if r > 0.0 { r * r.ln() } else { 0.0 };
    entropy + p * (p / SALIENCY_EPSILON).ln_1p()
}

/// The score of a token by a router that looks at positions alone; `None` by one that looks at queries, keys or values.
pub fn position_score(router: Router, layer: usize, head: usize, position: usize) -> Option<f64> {
    match router {
        // Ever lower.
        Router::FirstTokens => Some(-(position as f64)),
        Router::Random { seed } => Some(random_score(seed, layer, head, position)),
        Router::None => Some(0.0),
        Router::SelfSaliency | Router::ReceivedAttention | Router::SelfRecall => None,
    }
}

/// Score of the `random` router in [0, 1): depends on (seed, layer, head, position) alone, so that chunking cannot change it.
pub fn random_score(seed: u64, layer: usize, head: usize, position: usize) -> f64 {
    uniform(seed, [layer, head, position])
}

/// The budget that a selection head really has under the configured router.
pub fn effective_budget(config: &HybridConfig, head: usize) -> usize {
    if config.router == Router::None { 0 } else { config.budgets[head] }
}

/// Whether `a` is more salient than `b`, both `(score, position)`: ties go to the earlier token.
///
/// NaN ranks last, so that a broken score cannot displace a sound one.
pub fn order<T: Real>(a: &(T, u32), b: &(T, u32)) -> Ordering {
    let key = |score: T| if score.is_nan() { f64::NEG_INFINITY } else { score.wide() };
    key(b.0).total_cmp(&key(a.0)).then(a.1.cmp(&b.1))
}

/// Sorts candidates from most to least salient.
pub fn rank<T: Real>(candidates: &mut [(T, u32)]) {
    candidates.sort_unstable_by(order);
}

/// The `count` most salient candidates, the least of them last, the others in no order.
pub fn best<T: Real>(candidates: &mut [(T, u32)], count: usize) -> &[(T, u32)] {
    if count > 0 && count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, order);
    }
    &candidates[..count.min(candidates.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closed_form_equals_the_definition() {
        for own in [1e-12, 1e-4, 0.3, 0.9, 1.0 - 1e-12] {
            let others = [0.5, 0.25, 0.25].map(|share| share * (1.0 - own));
            let eps = SALIENCY_EPSILON;
            let total: f64 = others.iter().sum();
            let by_definition: f64 = others
                .iter()
                .map(|a| a * ((a + eps) / (a / total + eps)).ln())
                .chain([own * ((own + eps) / eps).ln()])
                .sum();
            let closed = self_saliency(total, own);
            assert!((closed - by_definition).abs() < 1e-6, "{own}: {closed} vs {by_definition}");
        }
    }

    #[test]
    fn a_lone_token_scores_highest() {
        assert!(self_saliency(0.0, 1.0) > self_saliency(1e-9, 1.0));
    }

    #[test]
    fn ties_go_to_the_earlier_token_and_nan_last() {
        let mut candidates = vec![(1.0_f32, 3), (f32::NAN, 0), (1.0, 2), (2.0, 9)];
        rank(&mut candidates);
        assert_eq!(candidates.iter().map(|c| c.1).collect::<Vec<_>>(), [9, 2, 3, 0]);
        candidates.reverse();
        assert_eq!(best(&mut candidates, 2).last(), Some(&(1.0, 2)));
        assert!(best(&mut candidates, 0).is_empty());
    }
}
