//! Dense causal softmax attention: the teacher's.

use super::sums::{dot, softmax};
use crate::config::HeadGeometry;

/// Softmax attention of the last `queries` of `tokens` tokens of one sequence, each to its own and every earlier token: `q`
/// `[H, queries, D]`, `k` and `v` `[K, tokens, D]` give `[H, queries, D]`.
pub fn dense_attention(
    geometry: HeadGeometry,
    (queries, tokens): (usize, usize),
    [q, k, v]: [&[f64]; 3],
) -> Vec<f64> {
    let d = geometry.head_dim;
    let mut out = vec![0.0; q.len()];
    let rows = q.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate();
    for (n, (query, out)) in rows {
        let (head, token) = (n / queries, tokens - queries + n % queries);
        let own = head / geometry.group() * tokens * d;
        let seen = own..own + (token + 1) * d;
        let keys = k[seen.clone()].chunks_exact(d);
        let logits: Vec<f64> = keys.map(|key| dot(query, key) / (d as f64).sqrt()).collect();
        for (weight, value) in softmax(&logits).into_iter().zip(v[seen].chunks_exact(d)) {
            out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
        }
    }
    out
}
