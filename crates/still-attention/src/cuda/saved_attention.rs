//! The operator forward and backward without a graph of its rows: see [`crate::attention_forward`].

use candle_core::backprop::GradStore;
use candle_core::{CudaDevice, Tensor};

use super::backward::backward;
use super::forward::{Operands, Saved, forward_by_token};
use super::layout::{rows_aligned, shape};
use super::routing::DeviceRouting;
use super::support::{self, LINEAR_ALONE};
use still_compute::pull_back;

use crate::{HeadGeometry, HybridConfig, HybridWeights, Result};

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct SavedAttention {
    device: CudaDevice,
    operands: Operands,
    saved: Saved,
    out: Tensor,
    /// Still in the graphs of what is learned: both maps and, with `LinearNorm::Mean`, `ln(n λ)`.
    learned: Vec<Tensor>,
}

impl SavedAttention {
    /// Queues the forward pass; none where the kernels do not take the rows as they are: heads that decide alone and share K and V, or
    /// the linear branch alone.
    pub fn forward(
        [q, k, v]: [&Tensor; 3],
        weights: &HybridWeights,
        config: &HybridConfig,
    ) -> Result<Option<(Tensor, Self)>> {
        let (_, num_heads, _, head_dim) = q.dims4()?;
        let num_key_value_heads = k.dim(1)?;
        let geometry = HeadGeometry { num_heads, num_key_value_heads, head_dim };
        let decides = geometry.selection_heads(config.selection_head);
        if decides != num_key_value_heads || config.branches == LINEAR_ALONE {
            return Ok(None);
        }
        config.validate(geometry)?;
        weights.check(geometry, config)?;
        support::check(q, [k, v], weights, geometry, config)?;
        let device = q.device().as_cuda_device()?.clone();
        let (map_q, map_k) = weights.folded()?;
        let log_scale = super::log_scale(weights, config)?;
        let shape = shape(q, num_key_value_heads)?;
        let (q, k, v) = (rows_aligned(q)?, rows_aligned(k)?, rows_aligned(v)?);
        let routing = DeviceRouting::decide(&device, &shape, [&q, &k], config)?;
        let operands =
            Operands::new(shape, [q, k, v], [&map_q, &map_k], log_scale.as_ref(), routing)?;
        let (out, saved) = forward_by_token(&device, &operands, true, None)?;
        let mut learned = vec![map_q, map_k];
        learned.extend(log_scale);
        Ok(Some((out.clone(), Self { device, operands, saved, out, learned })))
    }

    pub fn backward(self, d_out: &Tensor) -> Result<([Tensor; 3], GradStore)> {
        let Self { device, operands, saved, out, learned } = self;
        let to = backward(&device, &operands, &saved, &out, d_out)?;
        let mut whole: Option<Tensor> = None;
        for (tensor, gradient) in learned.iter().zip([Some(to.map_q), Some(to.map_k), to.log_scale])
        {
            let (Some(gradient), true) = (gradient, tensor.track_op()) else { continue };
            let part = pull_back(tensor, &gradient)?;
            whole = Some(match whole {
                Some(whole) => (whole + part)?,
                None => part,
            });
        }
        let grads = match whole {
            Some(whole) => whole.backward()?,
            None => GradStore::default(),
        };
        Ok(([to.q, to.k, to.v], grads))
    }
}
