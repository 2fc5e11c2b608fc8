//! The router `received_attention`:
//!
//! ```text
//! r_j = mean over t > j in chunks c(j), c(j)+1 of  softmax(s_t· over t's local keys)_j
//! ```
//!
//! A query's local keys are those of the chunk before its own, and of its own up to itself.

use super::sums::{logit, softmax};

/// Attention that each token of one query head receives, by the definition: the mean over the later tokens of its own
/// chunk and the next of their softmax over their local keys. Of a sequence that ends before, over those there are.
///
/// `q` and `k` are `[N, D]`; `scale` is that of logits.
pub fn received_attention(
    q: &[f64],
    k: &[f64],
    head_dim: usize,
    scale: f64,
    chunk: usize,
) -> Vec<f64> {
    let tokens = q.len() / head_dim;
    let row = |x: &'_ [f64], t: usize| x[t * head_dim..(t + 1) * head_dim].to_vec();
    let first_local = |t: usize| (t / chunk).saturating_sub(1) * chunk;
    let local: Vec<Vec<f64>> = (0..tokens)
        .map(|t| {
            let logits = (first_local(t)..=t).map(|j| logit(&row(q, t), &row(k, j), scale));
            softmax(&logits.collect::<Vec<f64>>())
        })
        .collect();
    (0..tokens)
        .map(|j| {
            let queries = j + 1..tokens.min((j / chunk + 2) * chunk);
            let count = queries.len().max(1) as f64;
            queries.map(|t| local[t][j - first_local(t)]).sum::<f64>() / count
        })
        .collect()
}
