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
    let keys = visible(head, t, salient);
    let (query, scale) = (head.query(h, t), head.logit_scale());
    let logits: Vec<f64> = keys.iter().map(|&j| logit(query, head.key(j), scale)).collect();
    let m = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let factor = window_factor(head, h);
    let mut numerator = vec![0.0; head.input.geometry.head_dim];
    let mut denominator = 0.0;
    for (&j, logit) in keys.iter().zip(&logits) {
        let e = factor * (logit - m).exp();
        denominator += e;
        numerator.iter_mut().zip(head.value(j)).for_each(|(o, v)| *o += e * v);
    }
    (numerator, denominator)
}

/// The tokens that `t` sees, under the branch switches.
fn visible(head: &Head<'_>, t: usize, salient: &[usize]) -> Vec<usize> {
    let branches = head.config.branches;
    let mut keys = if branches.salient { salient.to_vec() } else { Vec::new() };
    let previous = (t / head.config.chunk).saturating_sub(1) * head.config.chunk;
    keys.extend(if branches.window { previous..=t } else { t..=t });
    keys
}

/// `sigmoid(w_h)` (LoLCATs).
fn window_factor(head: &Head<'_>, h: usize) -> f64 {
    head.input.window_factor.as_ref().map_or(1.0, |w| 1.0 / (1.0 + (-w[h]).exp()))
}
