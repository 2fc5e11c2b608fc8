//! The linear state of a selection head:
//!
//! ```text
//! S += φ_k(k_j) v_jᵀ     z += φ_k(k_j)     n += 1
//! ```

use super::sums::dot;

/// `S` `[2F, D]`, `z` `[2F]` and `n`.
pub(super) struct LinearState {
    pub s: Vec<f64>,
    pub z: Vec<f64>,
    pub count: usize,
}

impl LinearState {
    pub fn new(features: usize, head_dim: usize) -> Self {
        Self { s: vec![0.0; features * head_dim], z: vec![0.0; features], count: 0 }
    }

    /// Adds a token, `phi` its `φ_k(k)` and `v` its value.
    pub fn absorb(&mut self, phi: &[f64], v: &[f64]) {
        let d = v.len();
        for (f, phi) in phi.iter().enumerate() {
            self.z[f] += phi;
            for (e, v) in v.iter().enumerate() {
                self.s[f * d + e] += phi * v;
            }
        }
        self.count += 1;
    }

    /// `φᵀS`, `[D]`.
    pub fn numerator(&self, phi: &[f64]) -> Vec<f64> {
        let d = self.s.len() / self.z.len();
        let column = |e: usize| (0..phi.len()).map(|f| phi[f] * self.s[f * d + e]).sum();
        (0..d).map(column).collect()
    }

    /// `φᵀz`
    pub fn denominator(&self, phi: &[f64]) -> f64 {
        dot(phi, &self.z)
    }
}
