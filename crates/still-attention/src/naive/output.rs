//! The output of the hybrid: exact and linear terms under one denominator.
//!
//! ```text
//!         Σ_j e^(s_tj − m) v_j  +  λ · γ_t ⊙ ( φ_q(q_t)ᵀ S )
//! o_t  =  ────────────────────────────────────────────────────
//!         Σ_j e^(s_tj − m)      +  λ · φ_q(q_t)ᵀ z
//!
//! λ = 1                        linear_norm = "sum"
//! λ = exp(ℓ_h) / max(n, 1)     linear_norm = "mean"
//! ```

use super::exact_terms::exact_terms;
use super::head::Head;
use super::retirement::Memory;
use crate::config::LinearNorm;

/// `o_t` of query head `h`, `[D]`.
pub(super) fn row(head: &Head<'_>, h: usize, t: usize, memory: &Memory) -> Vec<f64> {
    let (mut numerator, mut denominator) = exact_terms(head, h, t, &memory.salient);
    if head.config.branches.linear {
        let lambda = lambda(head, h, memory.state.count);
        let phi = head.phi_q(h, t);
        denominator += lambda * memory.state.denominator(&phi);
        for (e, linear) in memory.state.numerator(&phi).into_iter().enumerate() {
            numerator[e] += lambda * gate(head, h, t, e) * linear;
        }
    }
    numerator.into_iter().map(|numerator| numerator / denominator).collect()
}

/// `λ` after `count` tokens were absorbed.
fn lambda(head: &Head<'_>, h: usize, count: usize) -> f64 {
    match (head.config.linear_norm, &head.input.log_lambda) {
        (LinearNorm::Mean, Some(log_lambda)) => log_lambda[h].exp() / count.max(1) as f64,
        _ => 1.0,
    }
}

/// `γ_t` in one channel.
fn gate(head: &Head<'_>, h: usize, t: usize, channel: usize) -> f64 {
    let (n, d) = (head.input.tokens, head.input.geometry.head_dim);
    head.input.gate.as_ref().map_or(1.0, |gate| gate[(h * n + t) * d + channel])
}
