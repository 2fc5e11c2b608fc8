//! Softmax attention to a window of the last tokens, which layers of some families keep.

use super::sums::{logit, softmax};
use crate::config::HeadGeometry;

/// Causal softmax attention to the last `window` tokens, each token's own among them: `q` `[H, N, D]`, `k` and `v` `[K, N, D]` of
/// one sequence of `tokens` tokens give `[H, N, D]`. Logits are `q·k` times `scale`.
pub fn sliding_attention(
    geometry: HeadGeometry,
    (tokens, window): (usize, usize),
    scale: f64,
    [q, k, v]: [&[f64]; 3],
) -> Vec<f64> {
    let d = geometry.head_dim;
    let row = |x: &[f64], head: usize, token: usize| {
        x[(head * tokens + token) * d..(head * tokens + token + 1) * d].to_vec()
    };
    let mut out = vec![0.0; q.len()];
    for head in 0..geometry.num_heads {
        let kv = head / geometry.group();
        for token in 0..tokens {
            let seen = (token + 1).saturating_sub(window)..=token;
            let query = row(q, head, token);
            let logit = |other| logit(&query, &row(k, kv, other), scale);
            let logits: Vec<f64> = seen.clone().map(logit).collect();
            for (weight, other) in softmax(&logits).into_iter().zip(seen) {
                for (channel, value) in row(v, kv, other).into_iter().enumerate() {
                    out[(head * tokens + token) * d + channel] += weight * value;
                }
            }
        }
    }
    out
}
