//! The rows of one selection head.

use std::ops::Range;

use super::Input;
use super::feature_map::feature_row;
use crate::config::HybridConfig;

/// One selection head of a sequence: the KV head that it reads, and the query heads that share it.
pub(super) struct Head<'a> {
    pub input: &'a Input,
    /// The same with rows as a state gives them back that has kept them.
    pub kept: &'a Input,
    pub config: &'a HybridConfig,
    pub index: usize,
}

impl<'a> Head<'a> {
    /// The selection heads, in order.
    pub fn all(
        input: &'a Input,
        kept: &'a Input,
        config: &'a HybridConfig,
    ) -> impl Iterator<Item = Self> {
        let heads = input.geometry.selection_heads(config.selection_head);
        (0..heads).map(move |index| Self { input, kept, config, index })
    }

    fn count(&self) -> usize {
        self.input.geometry.selection_heads(self.config.selection_head)
    }

    /// The query heads whose tokens this head selects.
    pub fn query_heads(&self) -> Range<usize> {
        let group = self.input.geometry.num_heads / self.count();
        self.index * group..(self.index + 1) * group
    }

    fn kv_head(&self) -> usize {
        self.index * self.input.geometry.num_key_value_heads / self.count()
    }

    /// All rows of one head of `x` `[heads, N, D]`.
    fn rows(&self, x: &'a [f64], head: usize) -> &'a [f64] {
        let size = self.input.tokens * self.input.geometry.head_dim;
        &x[head * size..(head + 1) * size]
    }

    fn row(&self, x: &'a [f64], head: usize, t: usize) -> &'a [f64] {
        let d = self.input.geometry.head_dim;
        &self.rows(x, head)[t * d..(t + 1) * d]
    }

    /// `[N, D]` of query head `h`.
    pub fn queries(&self, h: usize) -> &'a [f64] {
        self.rows(&self.input.q, h)
    }

    /// `[N, D]`
    pub fn keys(&self) -> &'a [f64] {
        self.rows(&self.input.k, self.kv_head())
    }

    /// `q_t` of query head `h`.
    pub fn query(&self, h: usize, t: usize) -> &'a [f64] {
        self.row(&self.input.q, h, t)
    }

    /// `k_t`
    pub fn key(&self, t: usize) -> &'a [f64] {
        self.row(&self.input.k, self.kv_head(), t)
    }

    /// `v_t`
    pub fn value(&self, t: usize) -> &'a [f64] {
        self.row(&self.input.v, self.kv_head(), t)
    }

    /// `k_t` of a salient token.
    pub fn kept_key(&self, t: usize) -> &'a [f64] {
        self.row(&self.kept.k, self.kv_head(), t)
    }

    /// `v_t` of a salient token.
    pub fn kept_value(&self, t: usize) -> &'a [f64] {
        self.row(&self.kept.v, self.kv_head(), t)
    }

    /// What `q·k` is multiplied by in logits.
    pub fn logit_scale(&self) -> f64 {
        let root = (self.input.geometry.head_dim as f64).sqrt();
        self.config.logit_scale.unwrap_or(1.0 / root)
    }

    /// `φ_q(q_t)` of query head `h`, `[2F]`: the scale is no part of it.
    pub fn phi_q(&self, h: usize, t: usize) -> Vec<f64> {
        self.phi(self.query(h, t), &self.input.feature_map_q, &self.input.householder_q, h)
    }

    /// `φ_k(k)`, `[2F]`.
    pub fn phi_k(&self, k: &[f64]) -> Vec<f64> {
        self.phi(k, &self.input.feature_map_k, &self.input.householder_k, self.index)
    }

    fn phi(&self, x: &[f64], w: &[f64], householder: &Option<Vec<f64>>, head: usize) -> Vec<f64> {
        let d = self.input.geometry.head_dim;
        let size = d * self.config.feature_dim;
        let u = householder.as_ref().map(|u| &u[head * d..(head + 1) * d]);
        feature_row(self.config.feature_map, x, &w[head * size..(head + 1) * size], u)
    }
}
