//! The router `self_saliency`, by its definition (two distributions, then their divergence):
//!
//! ```text
//! σ_t = Σ_j a_j ln( (a_j + ε) / (b_j + ε) )
//! a   = softmax of s_t· over W_t                      W_t = { max(0, t−C+1) … t }
//! b   = softmax of s_t· over W_t \ { t },  b_t = 0
//! ```

use super::sums::{logit, softmax};
use crate::router::SALIENCY_EPSILON;

/// Self-Saliency Score of each token of one query head, by the definition (two distributions, then their KL).
///
/// `q` and `k` are `[N, D]`; `scale` is that of logits.
pub fn self_saliency(q: &[f64], k: &[f64], head_dim: usize, scale: f64, chunk: usize) -> Vec<f64> {
    let row = |x: &'_ [f64], t: usize| x[t * head_dim..(t + 1) * head_dim].to_vec();
    (0..q.len() / head_dim)
        .map(|t| {
            let window = (t + 1).saturating_sub(chunk)..=t;
            let s: Vec<f64> = window.map(|j| logit(&row(q, t), &row(k, j), scale)).collect();
            let a = softmax(&s);
            let mut b = softmax(&s[..s.len() - 1]);
            b.push(0.0);
            let eps = SALIENCY_EPSILON;
            a.iter().zip(&b).map(|(a, b)| a * ((a + eps) / (b + eps)).ln()).sum()
        })
        .collect()
}
