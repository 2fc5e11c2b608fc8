//! Sums over a row.

/// Softmax over a row.
pub(super) fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|x| x / sum).collect()
}

/// `aᵀb`
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `s_tj = c q_t·k_j`, with the logit scale `c`: `1/√D` unless something else is said.
pub(super) fn logit(q: &[f64], k: &[f64], scale: f64) -> f64 {
    scale * dot(k, q)
}
