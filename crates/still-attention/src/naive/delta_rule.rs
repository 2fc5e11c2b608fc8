//! A linear state that overwrites: the gated delta rule (arXiv 2412.06464), over the features of the linear branch.
//!
//! ```text
//! φ̂ = φ_k(k_j) / ‖φ_k(k_j)‖
//! S ← α_j (I − β_j φ̂ φ̂ᵀ) S + β_j φ̂ v_jᵀ        o = φ̂_qᵀ S
//! ```
//!
//! No kernel has it. It answers whether the additive state (`linear_state`) is what limits the linear branch's recall: an
//! additive state keeps every value that was ever bound to a key, this one replaces it.

use super::sums::dot;

/// `S` `[2F, D]`.
#[derive(Clone, Debug)]
pub struct DeltaState {
    s: Vec<f64>,
    features: usize,
}

impl DeltaState {
    /// An empty state of `features` by `head_dim` values.
    pub fn new(features: usize, head_dim: usize) -> Self {
        Self { s: vec![0.0; features * head_dim], features }
    }

    /// Binds `v` to a key of features `phi`, with the decay `alpha` and the rate `beta`, both from 0 to 1.
    pub fn absorb(&mut self, phi: &[f64], v: &[f64], alpha: f64, beta: f64) {
        let phi = unit(phi);
        let d = v.len();
        let held = self.recall(&phi);
        for (f, phi) in phi.iter().enumerate() {
            for e in 0..d {
                let s = &mut self.s[f * d + e];
                *s = alpha * (*s - beta * phi * held[e]) + beta * phi * v[e];
            }
        }
    }

    /// What is bound to a query of features `phi`, `[D]`.
    pub fn recall(&self, phi: &[f64]) -> Vec<f64> {
        let phi = unit(phi);
        let d = self.s.len() / self.features;
        (0..d).map(|e| (0..phi.len()).map(|f| phi[f] * self.s[f * d + e]).sum()).collect()
    }
}

fn unit(phi: &[f64]) -> Vec<f64> {
    let norm = dot(phi, phi).sqrt().max(1e-12);
    phi.iter().map(|phi| phi / norm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_replaces_what_was_bound_to_its_key() {
        let mut state = DeltaState::new(3, 2);
        state.absorb(&[2.0, 0.0, 0.0], &[1.0, 2.0], 1.0, 1.0);
        state.absorb(&[0.0, 3.0, 0.0], &[5.0, 6.0], 1.0, 1.0);
        assert_eq!(state.recall(&[1.0, 0.0, 0.0]), [1.0, 2.0]);
        state.absorb(&[1.0, 0.0, 0.0], &[-1.0, 0.5], 1.0, 1.0);
        assert_eq!(state.recall(&[4.0, 0.0, 0.0]), [-1.0, 0.5]);
        assert_eq!(state.recall(&[0.0, 1.0, 0.0]), [5.0, 6.0]);
    }

    #[test]
    fn decay_and_rate_are_the_recurrences() {
        // Two keys that are not orthogonal, the recurrence written with whole matrices.
        let keys = [[1.0, 0.0], [0.6, 0.8]];
        let (alpha, beta) = (0.9, 0.5);
        let mut state = DeltaState::new(2, 1);
        let mut s = [0.0, 0.0];
        for (key, value) in keys.iter().zip([3.0, -2.0]) {
            state.absorb(key, &[value], alpha, beta);
            let step = |f: usize| {
                let row = |g: usize| f64::from(u8::from(f == g)) - beta * key[f] * key[g];
                alpha * (row(0) * s[0] + row(1) * s[1]) + beta * key[f] * value
            };
            s = [step(0), step(1)];
        }
        for key in keys {
            let expected = key[0] * s[0] + key[1] * s[1];
            assert!((state.recall(&key)[0] - expected).abs() < 1e-12);
        }
    }
}
