//! `linear_only` (Hedgehog): every token is absorbed as it comes, nothing is exact. Written as sums over tokens:
//!
//! ```text
//! o_t = Σ_{j≤t} φ(q_t)ᵀφ(k_j) v_j / Σ_{j≤t} φ(q_t)ᵀφ(k_j)
//! ```

use super::head::Head;
use super::linear_state::LinearState;
use super::sums::dot;
use super::{Input, Output};
use crate::config::{HybridConfig, MIN_DENOMINATOR};

/// Runs the operator over one sequence.
pub(super) fn attention(input: &Input, config: &HybridConfig) -> Output {
    let (n, d) = (input.tokens, input.geometry.head_dim);
    let mut output = Output::new(input, config);
    for head in Head::all(input, input, config) {
        let phi_k: Vec<Vec<f64>> = (0..n).map(|j| head.phi_k(head.key(j))).collect();
        for h in head.query_heads() {
            for t in 0..n {
                let phi = head.phi_q(h, t);
                let weights: Vec<f64> = phi_k[..=t].iter().map(|phi_k| dot(&phi, phi_k)).collect();
                let denominator = weights.iter().sum::<f64>().max(MIN_DENOMINATOR);
                let channel = |e: usize| {
                    let terms = weights.iter().enumerate().map(|(j, w)| w * head.value(j)[e]);
                    terms.sum::<f64>() / denominator
                };
                output.set_row(input, h, t, &(0..d).map(channel).collect::<Vec<f64>>());
            }
        }
        let mut state = LinearState::new(2 * config.feature_dim, d);
        for (j, phi) in phi_k.iter().enumerate() {
            state.absorb(phi, head.value(j));
        }
        let absorbed_at = (0..n).map(|j| (j / config.chunk) as u32).collect();
        output.push_head(vec![0.0; n], absorbed_at, state);
    }
    output
}
