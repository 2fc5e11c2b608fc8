//! The operator on CUDA tensors: the kernels of `still-kernels`, queued on the tensors' stream.
//!
//! | file | content |
//! |---|---|
//! | `saved_attention` | the operator on tensors, and what its backward pass needs |
//! | `forward`, `backward` | the passes |
//! | `routing` | which tokens of each chunk are kept |
//! | `dense` | dense attention, whole sequences, continuations and decode steps |
//! | `decode`, `decode/past.rs` | the recurrent state; several tokens read onto it |
//! | `store` | the salient rows of a state |
//! | `kv_cache` | the teacher's cache |
//! | `graph_state` | what a CUDA graph feeds |
//! | `layout` | strides and memory for kernels |
//! | `support` | what kernels compute, and errors for the rest |

mod backward;
mod decode;
mod dense;
mod forward;
mod graph_state;
mod kv_cache;
mod layout;
mod routing;
mod saved_attention;
mod store;
mod support;

use candle_core::{DType, Tensor};

use crate::{HybridConfig, HybridWeights, LinearNorm, Result};

pub use decode::{CudaHybridState, CudaWeights};
pub(crate) use dense::dense_attention;
pub use graph_state::{GraphState, IDLE, StepRotation};
pub use kv_cache::CudaKvCache;
pub(crate) use routing::DeviceRouting;
pub(crate) use saved_attention::SavedAttention;
pub(crate) use support::check_logit_scale;

/// Every KV head `times` times, one copy beside the other.
fn repeated(rows: &Tensor, times: usize) -> Result<Tensor> {
    let rows = rows.detach();
    if times == 1 {
        return Ok(rows);
    }
    let (batch, heads, tokens, head_dim) = rows.dims4()?;
    let wide = rows.unsqueeze(2)?.broadcast_as((batch, heads, times, tokens, head_dim))?;
    Ok(wide.reshape((batch, heads * times, tokens, head_dim))?)
}

/// `ln(n λ)` per query head, if it is not 0 everywhere: minus infinity where the linear branch is off.
fn log_scale(weights: &HybridWeights, config: &HybridConfig) -> Result<Option<Tensor>> {
    let learned = learned_scale(weights, config)?;
    if config.branches.linear {
        return Ok(learned);
    }
    let map = &weights.feature_map_q;
    let any = match learned {
        Some(scale) => scale,
        None => Tensor::zeros(map.dim(0)?, DType::F32, map.device())?,
    };
    Ok(Some(any.affine(1.0, f64::NEG_INFINITY)?))
}

/// `ln(n λ)` per query head with `LinearNorm::Mean`: a factor `sigmoid(w)` on the exact terms is its inverse on the linear.
fn learned_scale(weights: &HybridWeights, config: &HybridConfig) -> Result<Option<Tensor>> {
    let Some(log_lambda) =
        weights.log_lambda.as_ref().filter(|_| config.linear_norm == LinearNorm::Mean)
    else {
        return Ok(None);
    };
    let log_lambda = log_lambda.detach();
    Ok(Some(match &weights.window_factor {
        Some(w) => (log_lambda + (w.detach().neg()?.exp()? + 1.0)?.log()?)?,
        None => log_lambda,
    }))
}
