//! The router `self_recall` (LoLA): the error of recalling a token's value from the linear state, before the token enters it.
//!
//! ```text
//! score_j = ‖ φ_k(k_j)ᵀ S / (φ_k(k_j)ᵀ z) − v_j ‖²
//! ```

use super::sums::dot;
use crate::config::MIN_DENOMINATOR;

/// `‖φ(k)ᵀS / φ(k)ᵀz − v‖²`; an empty state recalls 0.
///
/// `phi` is `[2F]`, `s` `[2F, D]`, `z` `[2F]`, `v` `[D]`.
pub fn recall_error(phi: &[f64], s: &[f64], z: &[f64], v: &[f64]) -> f64 {
    let denominator = dot(phi, z).max(MIN_DENOMINATOR);
    let recalled = |e: usize| -> f64 {
        phi.iter().enumerate().map(|(f, phi)| phi * s[f * v.len() + e]).sum::<f64>() / denominator
    };
    v.iter().enumerate().map(|(e, v)| (recalled(e) - v) * (recalled(e) - v)).sum()
}
