//! The operator on CUDA tensors: the kernels of `still-kernels`, queued on the tensors' stream.

mod attention;
mod backward;
mod decode;
mod dense;
mod forward;
mod kv_cache;
mod layout;
mod routing;
mod saved_attention;
mod store;
mod support;

use candle_core::{DType, Tensor};

use crate::hybrid::HybridOutput;
use crate::{
    HeadGeometry, HybridConfig, HybridWeights, LinearNorm, Result, Routing, SelectionHead,
};

pub use decode::{CudaHybridState, CudaWeights};
pub(crate) use dense::dense_attention;
pub use kv_cache::CudaKvCache;
pub(crate) use routing::DeviceRouting;
pub(crate) use saved_attention::SavedAttention;

use attention::Inputs;

/// [`crate::hybrid_attention`] on CUDA, its shapes checked.
pub(crate) fn hybrid_attention(
    [q, k, v]: [&Tensor; 3],
    weights: &HybridWeights,
    geometry: HeadGeometry,
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<HybridOutput> {
    support::check(q, [k, v], weights, geometry, config)?;
    // The kernels route by KV head: where every query head decides, each gets K and V of its own.
    let shared = match config.selection_head {
        SelectionHead::KvHead => 1,
        SelectionHead::QueryHead => geometry.group(),
    };
    let (k, v) = (repeated(k, shared)?, repeated(v, shared)?);
    let (map_q, map_k) = weights.folded()?;
    let inputs =
        Inputs { q: q.clone(), k, v, map_q, map_k, log_scale: log_scale(weights, config)? };
    attention::hybrid_attention(inputs, config, routing)
}

/// Every KV head `times` times, one copy beside the other.
fn repeated(rows: &Tensor, times: usize) -> Result<Tensor> {
    if times == 1 {
        return Ok(rows.clone());
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
    Ok(Some(match &weights.window_factor {
        Some(w) => (log_lambda + (w.neg()?.exp()? + 1.0)?.log()?)?,
        None => log_lambda.clone(),
    }))
}
