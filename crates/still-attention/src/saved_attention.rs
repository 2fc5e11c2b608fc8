//! The operator forward and backward without a graph: for callers that hold the gradients of rows themselves.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use still_compute::pull_back;

use crate::{HybridConfig, HybridWeights, Result, hybrid_attention};

/// What the backward pass of one [`attention_forward`] needs.
#[derive(Debug)]
pub struct SavedAttention(Kind);

#[derive(Debug)]
enum Kind {
    /// Rows are variables of a graph.
    Graph { rows: [Var; 3], gate: Option<Var>, out: Tensor },
    /// The kernels' own operands: no row is copied for a graph.
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::SavedAttention>),
}

/// As [`hybrid_attention`], without a graph of `q`, `k`, `v` and the gate, and by the router's own decision.
///
/// # Errors
/// As [`hybrid_attention`].
pub fn attention_forward(
    rows: [&Tensor; 3],
    gate: Option<&Tensor>,
    weights: &HybridWeights,
    config: &HybridConfig,
) -> Result<(Tensor, SavedAttention)> {
    #[cfg(feature = "cuda")]
    if rows[0].device().is_cuda()
        && gate.is_none()
        && let Some((out, saved)) = crate::cuda::SavedAttention::forward(rows, weights, config)?
    {
        return Ok((out, SavedAttention(Kind::Cuda(Box::new(saved)))));
    }
    let [q, k, v] = rows;
    let rows = [Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?];
    let gate = gate.map(Var::from_tensor).transpose()?;
    let open = gate.as_ref().map(Var::as_tensor);
    let out = hybrid_attention(&rows[0], &rows[1], &rows[2], weights, open, config, None)?.out;
    Ok((out.detach(), SavedAttention(Kind::Graph { rows, gate, out })))
}

impl SavedAttention {
    /// From the gradient of the output `[B, H, N, D]` to those of `q`, `k` and `v`, of the gate, if there is one, and, in the
    /// store, of what is learned.
    ///
    /// # Errors
    /// A gradient of another shape; an error of the tensor library.
    pub fn backward(self, d_out: &Tensor) -> Result<([Tensor; 3], Option<Tensor>, GradStore)> {
        match self.0 {
            Kind::Graph { rows, gate, out } => {
                let mut grads = pull_back(&out, &d_out.contiguous()?)?.backward()?;
                let mut of = |row: &Var| match grads.remove(row) {
                    Some(gradient) => Ok(gradient),
                    None => row.zeros_like(),
                };
                let gradients = [of(&rows[0])?, of(&rows[1])?, of(&rows[2])?];
                let gate = gate.as_ref().map(of).transpose()?;
                Ok((gradients, gate, grads))
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(saved) => {
                let (gradients, grads) = saved.backward(d_out)?;
                Ok((gradients, None, grads))
            }
        }
    }
}
