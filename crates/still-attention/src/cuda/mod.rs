//! The operator on CUDA tensors: the kernels of `still-kernels`, queued on the tensors' stream.
//!
//! | file | content |
//! |---|---|
//! | `saved_attention` | the operator on tensors, and what its backward pass needs |
//! | `forward`, `backward` | the passes |
//! | `routing` | which tokens of each chunk are kept |
//! | `dense` | dense attention, whole sequences, continuations and decode steps |
//! | `dense_rows` | the rows of its cache, as they come or as codes |
//! | `decode`, `decode/step.rs`, `decode/past.rs` | the recurrent state; a token, several tokens read onto it |
//! | `decode/saved.rs`, `saved_rows` | the same state as tensors on the host, and its rows |
//! | `saved_channels` | keys coded by channel, on the device and saved |
//! | `store` | the salient rows of a state |
//! | `sections` | several arrays in one buffer |
//! | `kv_cache` | the teacher's cache |
//! | `linear_only` | the state of linear attention alone |
//! | `linear_features` | its feature map |
//! | `foreign` | the operator in memory of another library, on its stream |
//! | `graph_state` | what a CUDA graph feeds |
//! | `step_table` | steps of sequences that have a state each |
//! | `layout` | strides and memory for kernels, and what they are told of a configuration |
//! | `support` | what kernels compute, and errors for the rest |

mod backward;
mod decode;
mod dense;
mod dense_rows;
mod foreign;
mod forward;
mod graph_state;
mod kv_cache;
mod layout;
mod linear_features;
mod linear_only;
mod routing;
mod saved_attention;
mod saved_channels;
mod saved_rows;
mod sections;
mod step_table;
mod store;
mod support;

use candle_core::Tensor;

use crate::{HybridConfig, HybridWeights, LinearNorm, Result};

pub use decode::{CudaHybridState, CudaWeights};
pub(crate) use dense::dense_attention;
pub use foreign::{
    DeviceAttention, DeviceGradients, DeviceMaps, DeviceOperands, DeviceRows, DeviceSizes,
    OperandShapes, check_shapes,
};
pub use graph_state::{GraphState, GraphStep, IDLE, StepRotation};
pub use kv_cache::CudaKvCache;
pub(crate) use linear_features::{features, features_backward};
pub use linear_only::CudaLinearState;
pub(crate) use routing::DeviceRouting;
pub(crate) use saved_attention::SavedAttention;
pub use step_table::{StepTable, TableState};
pub(crate) use support::check_logit_scale;

/// Every KV head `times` times, the copies next to each other.
fn repeated(rows: &Tensor, times: usize) -> Result<Tensor> {
    let rows = rows.detach();
    if times == 1 {
        return Ok(rows);
    }
    let (batch, heads, tokens, head_dim) = rows.dims4()?;
    let wide = rows.unsqueeze(2)?.broadcast_as((batch, heads, times, tokens, head_dim))?;
    Ok(wide.reshape((batch, heads * times, tokens, head_dim))?)
}

/// The logarithm of the linear branch's scale per query head, `n λ` with `LinearNorm::Mean` and else `λ`, if it is not 0
/// everywhere. A factor `sigmoid(w)` on the exact terms is its inverse on the linear ones.
fn log_scale(weights: &HybridWeights, config: &HybridConfig) -> Result<Option<Tensor>> {
    let mean = config.linear_norm == LinearNorm::Mean;
    let log_lambda = weights.log_lambda.as_ref().filter(|_| mean).map(Tensor::detach);
    let Some(w) = &weights.window_factor else { return Ok(log_lambda) };
    let against_window = (w.detach().neg()?.exp()? + 1.0)?.log()?;
    Ok(Some(match log_lambda {
        Some(log_lambda) => (log_lambda + against_window)?,
        None => against_window,
    }))
}
