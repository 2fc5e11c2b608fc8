//! The operator walked forward and back by hand: for callers that hold the gradients of rows themselves.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use still_compute::pull_back;

use crate::{HybridConfig, HybridWeights, Result, hybrid_attention};

/// What the way back of one [`walk_attention`] needs.
#[derive(Debug)]
pub struct AttentionWalk(Kind);

#[derive(Debug)]
enum Kind {
    /// Rows are variables of a graph.
    Graph { rows: [Var; 3], out: Tensor },
    /// The kernels' own operands: no row is copied for a graph.
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::Walk>),
}

/// As [`hybrid_attention`], without a graph of `q`, `k` and `v`, without a gate and by the router's own decision.
///
/// # Errors
/// As [`hybrid_attention`].
pub fn walk_attention(
    rows: [&Tensor; 3],
    weights: &HybridWeights,
    config: &HybridConfig,
) -> Result<(Tensor, AttentionWalk)> {
    #[cfg(feature = "cuda")]
    if rows[0].device().is_cuda()
        && let Some((out, walk)) = crate::cuda::walk(rows, weights, config)?
    {
        return Ok((out, AttentionWalk(Kind::Cuda(Box::new(walk)))));
    }
    let [q, k, v] = rows;
    let rows = [Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?];
    let out = hybrid_attention(&rows[0], &rows[1], &rows[2], weights, None, config, None)?.out;
    Ok((out.detach(), AttentionWalk(Kind::Graph { rows, out })))
}

impl AttentionWalk {
    /// From the gradient of the output `[B, H, N, D]` to those of `q`, `k` and `v`, and, in the store, of what is learned.
    ///
    /// # Errors
    /// A gradient of another shape; an error of the tensor library.
    pub fn back(self, d_out: &Tensor) -> Result<([Tensor; 3], GradStore)> {
        match self.0 {
            Kind::Graph { rows, out } => {
                let mut grads = pull_back(&out, &d_out.contiguous()?)?.backward()?;
                let mut of = |row: &Var| match grads.remove(row) {
                    Some(gradient) => Ok(gradient),
                    None => row.zeros_like(),
                };
                let gradients = [of(&rows[0])?, of(&rows[1])?, of(&rows[2])?];
                Ok((gradients, grads))
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(walk) => walk.back(d_out),
        }
    }
}
