//! The exact terms of a query:
//!
//! ```text
//! sigmoid(w_h) Σ_j e^(s_tj − m) v_j        j: the tokens that t sees
//! sigmoid(w_h) Σ_j e^(s_tj − m)            m: the largest of their logits
//! ```
//!
//! A query in chunk `c` sees the salient tokens, all of chunk `c−1`, and chunk `c` up to itself. Without a window factor,
//! 1 stands for the sigmoid.

use super::head::Head;
use super::sums::logit;

/// Numerator `[D]` and denominator of query head `h` at token `t`.
pub(super) fn exact_terms(
    head: &Head<'_>,
    h: usize,
    t: usize,
    salient: &[usize],
) -> (Vec<f64>, f64) {
    let rows = visible(head, t, salient);
    let (query, scale) = (head.query(h, t), head.logit_scale());
    let logits: Vec<f64> = rows.iter().map(|(key, _)| logit(query, key, scale)).collect();
    let m = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let factor = window_factor(head, h);
    let mut numerator = vec![0.0; head.input.geometry.head_dim];
    let mut denominator = 0.0;
    for ((_, value), logit) in rows.iter().zip(&logits) {
        let e = factor * (logit - m).exp();
        denominator += e;
        numerator.iter_mut().zip(*value).for_each(|(o, v)| *o += e * v);
    }
    (numerator, denominator)
}

/// Key and value of the tokens that `t` sees, under the branch switches.
fn visible<'a>(head: &Head<'a>, t: usize, salient: &[usize]) -> Vec<(&'a [f64], &'a [f64])> {
    let branches = head.config.branches;
    let salient = if branches.salient { salient } else { &[] };
    let previous = (t / head.config.chunk).saturating_sub(1) * head.config.chunk;
    let window = if branches.window { previous..=t } else { t..=t };
    let kept = salient.iter().map(|&j| (head.kept_key(j), head.kept_value(j)));
    kept.chain(window.map(|j| (head.key(j), head.value(j)))).collect()
}

/// `sigmoid(w_h)` (LoLCATs).
fn window_factor(head: &Head<'_>, h: usize) -> f64 {
    head.input.window_factor.as_ref().map_or(1.0, |w| 1.0 / (1.0 + (-w[h]).exp()))
}
