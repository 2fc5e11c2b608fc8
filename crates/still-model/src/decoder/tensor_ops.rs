//! A layer on tensors, in the tensor library's graph: prefill on every device, and gradients for users of the library.

use candle_core::Tensor;

use super::layer_ops::{LayerOps, Norm, Projected, Projection, RopeBase};
use super::ops::linear::linear_onto;
use super::ops::{
    Rotation, frozen_linear, gated, low_rank_linear, residual, rms_norm, rms_norm_heads,
    split_heads,
};
use crate::config::Activation;
use crate::error::{ModelError, Result};

/// [`LayerOps`] on tensors `[B, N, width]`; heads are `[B, H, N, D]`.
#[derive(Clone, Copy, Debug)]
pub struct TensorOps<'r> {
    head_dim: usize,
    rotation: Option<&'r Rotation>,
}

impl<'r> TensorOps<'r> {
    /// For heads of `head_dim` channels; the half of a layer after its attention needs no rotation.
    pub fn new(head_dim: usize, rotation: Option<&'r Rotation>) -> Self {
        Self { head_dim, rotation }
    }
}

/// A projection in the graph: the gradient flows to `x`, to an update and to a weight that is learned.
fn project(x: &Tensor, projection: &Projection<'_>) -> Result<Tensor> {
    let Projection { linear, lora, learned, .. } = projection;
    let learned = learned.filter(|weight| weight.track_op());
    let y = match (lora, learned) {
        // A constant weight must not cost its gradient.
        (None, None) => return Ok(frozen_linear(x, &linear.weight, linear.bias.as_ref())?),
        (Some(lora), _) => low_rank_linear(x, &linear.weight, lora)?,
        (None, Some(weight)) => x.broadcast_matmul(&weight.to_dtype(x.dtype())?.t()?)?,
    };
    let y = match (lora, learned) {
        // The op above knows no gradient of its matrix: this adds nothing else.
        (Some(_), Some(weight)) => {
            let difference = (weight - weight.detach())?.to_dtype(x.dtype())?;
            (y + x.broadcast_matmul(&difference.t()?)?)?
        }
        _ => y,
    };
    match &linear.bias {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}

impl<'w> LayerOps<'w> for TensorOps<'_> {
    type Rows = Tensor;
    type Input = Tensor;
    type Heads = Tensor;

    fn norm(&mut self, x: &Tensor, norm: Norm<'w>) -> Result<Tensor> {
        Ok(rms_norm(x, norm.weight, norm.eps)?)
    }

    fn input(&mut self, x: &Tensor) -> Tensor {
        x.clone()
    }

    fn project(&mut self, x: &Tensor, projections: &[Projection<'w>]) -> Result<Projected<Tensor>> {
        projections.iter().map(|projection| project(x, projection)).collect()
    }

    fn project_onto(
        &mut self,
        onto: Tensor,
        x: &Tensor,
        projection: Projection<'w>,
        norm: Option<Norm<'w>>,
    ) -> Result<Tensor> {
        let Projection { linear, lora, learned, .. } = &projection;
        if let (None, None, None) = (norm, learned, &linear.bias)
            && let Some(sum) = linear_onto(&onto, x, &linear.weight, *lora)?
        {
            return Ok(sum);
        }
        let mut y = project(x, &projection)?;
        if let Some(norm) = norm {
            y = self.norm(&y, norm)?;
        }
        Ok(residual(&onto, &y)?)
    }

    fn gated(
        &mut self,
        x: &Tensor,
        gate: Projection<'w>,
        up: Projection<'w>,
        activation: Activation,
    ) -> Result<Tensor> {
        Ok(gated(x, &gate.linear, &up.linear, activation)?)
    }

    fn heads(
        &mut self,
        rows: Tensor,
        norm: Option<Norm<'w>>,
        rope: Option<RopeBase>,
    ) -> Result<Tensor> {
        let rows = match norm {
            Some(Norm { weight, eps }) => rms_norm_heads(&rows, weight, eps)?,
            None => rows,
        };
        let rotation = match (rope, self.rotation) {
            (Some(_), None) => {
                return Err(ModelError::Invalid("heads without positions to rotate by".into()));
            }
            (Some(base), Some(rotation)) => Some(rotation.of(base)?),
            (None, _) => None,
        };
        Ok(split_heads(&rows, self.head_dim, rotation)?)
    }

    fn output_gate(&mut self, rows: Tensor) -> Result<Tensor> {
        let gate = (rows.neg()?.exp()? + 1.0)?.recip()?;
        Ok(split_heads(&gate, self.head_dim, None)?)
    }
}
