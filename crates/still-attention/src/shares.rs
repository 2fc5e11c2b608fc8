//! What each branch carries: its share of the denominator, and of the output's size.
//!
//! A diagnosis, not a kernel: float64, token by token. A converted hybrid can ignore its linear branch and look fine on short
//! questions (arXiv 2510.05901); these shares show it.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::config::{HeadGeometry, HybridConfig, LinearNorm, Mode, logit_scale};
use crate::error::{AttentionError, Result};
use crate::naive::feature_row;
use crate::selection::Selection;
use crate::weights::HybridWeights;
use still_compute::tensor::borrow;

/// Shares of one query head's branches, means over the tokens for which all three can matter (from the third chunk on).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BranchShares {
    /// Of the denominator: window, salient, linear; they add up to 1.
    pub mass: [f64; 3],
    /// Of the output's size, `‖part‖ / Σ‖parts‖`: window, salient, linear; they add up to 1.
    pub norm: [f64; 3],
    /// Tokens of the mean.
    pub tokens: usize,
}

/// The shares of every query head over one sequence.
///
/// `q` `[1, H, N, D]`, `k` and `v` `[1, K, N, D]` after RoPE, f32; `selection` as [`crate::hybrid_attention`] left it. A gate
/// counts as open. A sequence without a third chunk has no tokens to speak of.
///
/// # Errors
/// Shapes that do not fit, or a configuration without branches (`linear_only`).
pub fn branch_shares(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    weights: &HybridWeights,
    config: &HybridConfig,
    selection: &Selection,
) -> Result<Vec<BranchShares>> {
    let (batch, num_heads, tokens, head_dim) = q.dims4()?;
    let num_key_value_heads = k.dim(1)?;
    let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
    weights.check(geometry, config)?;
    if batch != 1 || selection.batch != 1 || selection.tokens != tokens {
        return Err(AttentionError::Config(
            "branch shares are of one sequence with its own selection".into(),
        ));
    }
    if config.mode == Mode::LinearOnly {
        return Err(AttentionError::Config("linear_only has one branch alone".into()));
    }
    let wide = |tensor: &Tensor| -> Result<Vec<f64>> {
        Ok(borrow(tensor, |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect())?)
    };
    let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(wide).transpose();
    let (map_q, map_k) = weights.folded()?;
    let layer = Layer {
        geometry,
        tokens,
        config,
        selection,
        q: wide(q)?,
        k: wide(k)?,
        v: wide(v)?,
        map_q: wide(&map_q.contiguous()?)?,
        map_k: wide(&map_k.contiguous()?)?,
        log_lambda: optional(&weights.log_lambda)?,
        window_factor: optional(&weights.window_factor)?,
    };
    Ok((0..num_heads).into_par_iter().map(|head| layer.head(head)).collect())
}

/// One layer's sequence, widened.
struct Layer<'a> {
    geometry: HeadGeometry,
    tokens: usize,
    config: &'a HybridConfig,
    selection: &'a Selection,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    map_q: Vec<f64>,
    map_k: Vec<f64>,
    log_lambda: Option<Vec<f64>>,
    window_factor: Option<Vec<f64>>,
}

/// A branch's part of numerator and denominator.
#[derive(Clone)]
struct Part {
    numerator: Vec<f64>,
    denominator: f64,
}

impl Part {
    fn zero(d: usize) -> Self {
        Self { numerator: vec![0.0; d], denominator: 0.0 }
    }

    fn add(&mut self, weight: f64, value: &[f64]) {
        self.denominator += weight;
        self.numerator.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
    }
}

impl Layer<'_> {
    fn row<'b>(&self, x: &'b [f64], head: usize, token: usize) -> &'b [f64] {
        let d = self.geometry.head_dim;
        let start = (head * self.tokens + token) * d;
        &x[start..start + d]
    }

    fn features(&self, x: &[f64], maps: &[f64], head: usize) -> Vec<f64> {
        let size = self.geometry.head_dim * self.config.feature_dim;
        feature_row(self.config.feature_map, x, &maps[head * size..(head + 1) * size], None)
    }

    fn head(&self, head: usize) -> BranchShares {
        let HeadGeometry { num_heads, num_key_value_heads, head_dim: d } = self.geometry;
        let (chunk, branches) = (self.config.chunk, self.config.branches);
        let selection_heads = self.geometry.selection_heads(self.config.selection_head);
        let s = head * selection_heads / num_heads;
        let kv = s * num_key_value_heads / selection_heads;
        let scale = logit_scale(self.config.logit_scale, d);
        let factor = self.window_factor.as_ref().map_or(1.0, |w| 1.0 / (1.0 + (-w[head]).exp()));
        let absorbed_at = self.selection.row(0, s);
        let mut state: Vec<Part> = vec![Part::zero(d); 2 * self.config.feature_dim];
        let mut count = 0_usize;
        let mut shares = BranchShares::default();
        for c in 2..self.tokens.div_ceil(chunk) {
            for j in (0..(c - 1) * chunk).filter(|&j| absorbed_at[j] as usize == c) {
                let phi = self.features(self.row(&self.k, kv, j), &self.map_k, s);
                let value = self.row(&self.v, kv, j);
                state.iter_mut().zip(&phi).for_each(|(part, phi)| part.add(*phi, value));
                count += 1;
            }
            let salient: Vec<usize> = match branches.salient {
                true => (0..(c - 1) * chunk).filter(|&j| absorbed_at[j] as usize > c).collect(),
                false => Vec::new(),
            };
            for t in c * chunk..self.tokens.min((c + 1) * chunk) {
                let query = self.row(&self.q, head, t);
                let first = if branches.window { (c - 1) * chunk } else { t };
                let keys = salient.iter().copied().chain(first..=t);
                let logits: Vec<(usize, f64)> =
                    keys.map(|j| (j, scale * dot(self.row(&self.k, kv, j), query))).collect();
                let m = logits.iter().map(|&(_, logit)| logit).fold(f64::NEG_INFINITY, f64::max);
                let mut parts = [Part::zero(d), Part::zero(d), Part::zero(d)];
                for (n, (j, logit)) in logits.into_iter().enumerate() {
                    let part = usize::from(n < salient.len());
                    parts[part].add(factor * (logit - m).exp(), self.row(&self.v, kv, j));
                }
                if branches.linear {
                    let scale = match (self.config.linear_norm, &self.log_lambda) {
                        (LinearNorm::Mean, Some(l)) => l[head].exp() / count.max(1) as f64,
                        _ => 1.0,
                    };
                    let phi = self.features(query, &self.map_q, head);
                    for (phi, state) in phi.iter().zip(&state) {
                        parts[2].denominator += scale * phi * state.denominator;
                        let sums = parts[2].numerator.iter_mut().zip(&state.numerator);
                        sums.for_each(|(sum, x)| *sum += scale * phi * x);
                    }
                }
                shares.count(&parts);
            }
        }
        shares.mean()
    }
}

impl BranchShares {
    fn count(&mut self, parts: &[Part; 3]) {
        let mass = parts.each_ref().map(|part| part.denominator);
        let norm = parts.each_ref().map(|part| dot(&part.numerator, &part.numerator).sqrt());
        for (sum, x) in [(&mut self.mass, mass), (&mut self.norm, norm)] {
            // A token whose values are all zero has no size to share.
            let total = x.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x / total);
        }
        self.tokens += 1;
    }

    fn mean(self) -> Self {
        let n = self.tokens.max(1) as f64;
        Self { mass: self.mass.map(|x| x / n), norm: self.norm.map(|x| x / n), ..self }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
