//! The learned tensors of one hybrid attention layer.

use candle_core::Tensor;

use still_compute::Real;

use crate::arguments::expect_shape;
use crate::config::{HeadGeometry, HybridConfig, LinearNorm};
use crate::error::{AttentionError, Result};
use crate::feature_map::{fold_householder, fold_householder_backward};

/// Learned tensors of the operator in one layer, f32 (or f64 for gradient checks).
///
/// Feature maps multiply row vectors from the right: `f(x) = x W`. `S` is the number of selection
/// heads, `H` of query heads. The output gate's projection belongs to the model: the operator
/// takes the gate's value.
#[derive(Clone, Debug)]
pub struct HybridWeights {
    /// `W` of `φ_q`, `[H, D, F]`.
    pub feature_map_q: Tensor,
    /// `W` of `φ_k`, `[S, D, F]`.
    pub feature_map_k: Tensor,
    /// Householder vectors of `φ_q`, `[H, D]`.
    pub householder_q: Option<Tensor>,
    /// Householder vectors of `φ_k`, `[S, D]`.
    pub householder_k: Option<Tensor>,
    /// `ℓ`, `[H]`: the linear branch's scale is `exp(ℓ)/max(n, 1)`. Present with `LinearNorm::Mean`.
    pub log_lambda: Option<Tensor>,
    /// `w`, `[H]`: the exact terms are multiplied by `sigmoid(w)`. Present with `window_factor`.
    pub window_factor: Option<Tensor>,
}

impl HybridWeights {
    /// The tensors that are there, always in this order.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let Self {
            feature_map_q,
            feature_map_k,
            householder_q,
            householder_k,
            log_lambda,
            window_factor,
        } = self;
        let optional = [householder_q, householder_k, log_lambda, window_factor];
        [feature_map_q, feature_map_k].into_iter().chain(optional.into_iter().flatten())
    }

    /// The maps' matrices with their Householder reflections folded in, in no graph.
    pub(crate) fn folded(&self) -> Result<(Tensor, Tensor)> {
        let fold = |w: &Tensor, u: &Option<Tensor>| match u {
            Some(u) => fold_householder(&w.detach(), &u.detach()),
            None => Ok(w.detach()),
        };
        Ok((
            fold(&self.feature_map_q, &self.householder_q)?,
            fold(&self.feature_map_k, &self.householder_k)?,
        ))
    }

    /// The gradient of each tensor from those of the folded maps and, by query head, of `ln(scale of the linear branch)`.
    pub(crate) fn gradients(
        &self,
        d_map_q: Tensor,
        d_map_k: Tensor,
        d_log_scale: Option<&Tensor>,
    ) -> Result<Self> {
        let unfold = |w: &Tensor, u: &Option<Tensor>, d: Tensor| -> Result<_> {
            let Some(u) = u else { return Ok((d, None)) };
            let (d_w, d_u) = fold_householder_backward(&w.detach(), &u.detach(), &d)?;
            Ok((d_w, Some(d_u)))
        };
        let (feature_map_q, householder_q) =
            unfold(&self.feature_map_q, &self.householder_q, d_map_q)?;
        let (feature_map_k, householder_k) =
            unfold(&self.feature_map_k, &self.householder_k, d_map_k)?;
        let log_lambda = self.log_lambda.as_ref().and(d_log_scale).cloned();
        // The scale has the factor 1/sigmoid(w): d ln(1/sigmoid(w)) / dw = sigmoid(w) − 1.
        let of_factor = |(w, d): (&Tensor, &Tensor)| -> candle_core::Result<Tensor> {
            let sigmoid = (w.detach().neg()?.exp()? + 1.0)?.recip()?;
            d * (sigmoid - 1.0)?
        };
        let window_factor = self.window_factor.as_ref().zip(d_log_scale);
        let window_factor = window_factor.map(of_factor).transpose()?;
        Ok(Self {
            feature_map_q,
            feature_map_k,
            householder_q,
            householder_k,
            log_lambda,
            window_factor,
        })
    }

    /// Checks shapes and presence against the configuration.
    ///
    /// # Errors
    /// Names the tensor that does not fit.
    pub fn check(&self, geometry: HeadGeometry, config: &HybridConfig) -> Result<()> {
        const OP: &str = "HybridWeights::check";
        let HeadGeometry { num_heads, head_dim, .. } = geometry;
        let heads = geometry.selection_heads(config.selection_head);
        let features = config.feature_dim;
        expect_shape(OP, "feature_map_q", &self.feature_map_q, &[num_heads, head_dim, features])?;
        expect_shape(OP, "feature_map_k", &self.feature_map_k, &[heads, head_dim, features])?;
        let householder = config.feature_map.reflects();
        let optional = [
            ("householder_q", &self.householder_q, householder, vec![num_heads, head_dim]),
            ("householder_k", &self.householder_k, householder, vec![heads, head_dim]),
            (
                "log_lambda",
                &self.log_lambda,
                config.linear_norm == LinearNorm::Mean,
                vec![num_heads],
            ),
            ("window_factor", &self.window_factor, config.window_factor, vec![num_heads]),
        ];
        for (name, tensor, wanted, shape) in optional {
            match tensor {
                Some(tensor) if wanted => expect_shape(OP, name, tensor, &shape)?,
                None if !wanted => {}
                Some(_) => {
                    return Err(AttentionError::Config(format!(
                        "{name} was given, but the configuration has no use for it"
                    )));
                }
                None => {
                    return Err(AttentionError::Config(format!(
                        "the configuration needs {name}, which is missing"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// `1 / sigmoid(x)`.
pub(crate) fn inverse_sigmoid<T: Real>(x: T) -> T {
    T::one() + (-x).exp()
}
