//! What the kernels compute, and errors that name what they do not.

use candle_core::{DType, Device, Tensor};
use still_kernels::{CHUNK, HEAD_DIMS, MAX_CAP, MAX_DECODE_GROUP};

use crate::arguments::expect_rows;
use crate::hybrid::OP;
use crate::{
    AttentionError, Branches, FeatureMap, HeadGeometry, HybridConfig, HybridWeights, LinearNorm,
    Mode, Result, Router,
};

/// The linear branch by itself: of the exact keys only each token's own remains.
pub(super) const LINEAR_ALONE: Branches = Branches { window: false, salient: false, linear: true };

/// Checks a call whose shapes fit each other.
pub(super) fn check(
    q: &Tensor,
    key_side: [&Tensor; 2],
    weights: &HybridWeights,
    geometry: HeadGeometry,
    config: &HybridConfig,
) -> Result<()> {
    // The linear branch alone is composed of tensor ops; of all else it asks what the kernels do.
    let is_alone = config.branches == LINEAR_ALONE;
    require(
        !is_alone || config.cap.is_none(),
        "cap",
        "none with the linear branch alone on CUDA",
        || format!("{:?}", config.cap),
    )?;
    let branches = if is_alone { Branches::default() } else { config.branches };
    check_config(geometry, &HybridConfig { branches, ..config.clone() })?;
    check_rows(q, key_side)?;
    let HybridWeights { feature_map_q, feature_map_k, .. } = weights;
    let optional = [
        ("householder_q", &weights.householder_q),
        ("householder_k", &weights.householder_k),
        ("log_lambda", &weights.log_lambda),
        ("window_factor", &weights.window_factor),
    ];
    let learned = [("feature_map_q", feature_map_q), ("feature_map_k", feature_map_k)]
        .into_iter()
        .chain(optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?))));
    for (name, tensor) in learned {
        check_device(name, tensor, q)?;
        let fits = tensor.dtype() == DType::F32;
        require(fits, name, "f32: the kernels round what they multiply", || {
            tensor.dtype().as_str().into()
        })?;
    }
    Ok(())
}

/// Checks the rows of a call: of one dtype that has kernels, on one device.
pub(super) fn check_rows(q: &Tensor, key_side: [&Tensor; 2]) -> Result<()> {
    let dtype = q.dtype();
    check_dtype("q", dtype)?;
    require(q.elem_count() > 0, "q", "one token or more on CUDA", || format!("{:?}", q.dims()))?;
    for (name, tensor) in ["k", "v"].into_iter().zip(key_side) {
        check_device(name, tensor, q)?;
        require(tensor.dtype() == dtype, name, "of q's dtype", || tensor.dtype().as_str().into())?;
    }
    Ok(())
}

/// Checks what is fed to `batch` sequences whose rows are held in `dtype` on `device`: `q` `[B, H, T, D]`, `k` and `v` `[B, K, T, D]`.
pub(super) fn check_fed(
    op: &'static str,
    [q, k, v]: [&Tensor; 3],
    geometry: HeadGeometry,
    batch: usize,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    expect_rows(op, [q, k, v], geometry, batch)?;
    check_rows(q, [k, v])?;
    require(q.dtype() == dtype, "q", "of the dtype of the rows that are held", || {
        format!("{}, the rows are {}", q.dtype().as_str(), dtype.as_str())
    })?;
    require(q.device().same_device(device), "q", "a tensor on the device of the rows", || {
        format!("on {:?}", q.device().location())
    })
}

pub(super) fn check_dtype(what: &'static str, dtype: DType) -> Result<()> {
    require(matches!(dtype, DType::F32 | DType::BF16), what, "f32 or bf16 on CUDA", || {
        dtype.as_str().into()
    })
}

fn check_device(name: &'static str, tensor: &Tensor, q: &Tensor) -> Result<()> {
    require(tensor.device().same_device(q.device()), name, "a tensor on q's device", || {
        format!("on {:?}", tensor.device().location())
    })
}

/// Checks what the kernels of whole sequences can be told.
pub(super) fn check_config(geometry: HeadGeometry, config: &HybridConfig) -> Result<()> {
    let head_dim = geometry.head_dim;
    require(config.mode == Mode::Hybrid, "mode", "hybrid on CUDA", || {
        format!("{:?}", config.mode)
    })?;
    require(config.chunk == CHUNK, "chunk", "64 on CUDA", || config.chunk.to_string())?;
    require(HEAD_DIMS.contains(&head_dim), "head_dim", "64, 96 or 128 on CUDA", || {
        head_dim.to_string()
    })?;
    require(config.feature_dim == head_dim, "feature_dim", "head_dim on CUDA", || {
        config.feature_dim.to_string()
    })?;
    let np_map = matches!(config.feature_map, FeatureMap::NpMap { .. });
    require(np_map, "feature_map", "np_map on CUDA", || format!("{:?}", config.feature_map))?;
    let known =
        matches!(config.router, Router::SelfSaliency | Router::Random { .. } | Router::None);
    require(known, "router", "self_saliency, random or none on CUDA", || {
        format!("{:?}", config.router)
    })?;
    let cap = config.cap.unwrap_or(0);
    require(cap <= MAX_CAP, "cap", "at most 8192 on CUDA", || cap.to_string())?;
    require(!config.gate, "gate", "off on CUDA", || "on".into())?;
    check_logit_scale(config.logit_scale, head_dim)?;
    let factor = config.window_factor && config.linear_norm == LinearNorm::Sum;
    require(!factor, "window_factor", "off with linear_norm sum on CUDA", || "on".into())?;
    // Of the linear branch the kernels are told that it weighs nothing.
    let exact = Branches { linear: true, ..config.branches };
    require(exact == Branches::default(), "branches", "window and salient on on CUDA", || {
        format!("{:?}", config.branches)
    })
}

/// Checks the scale of logits, if it is given.
pub(crate) fn check_logit_scale(given: Option<f64>, head_dim: usize) -> Result<()> {
    let root = (head_dim as f64).sqrt();
    let usual = given.is_none_or(|scale| (scale * root - 1.0).abs() <= 1e-6);
    require(usual, "logit_scale", "the root of 1 / head_dim on CUDA", || format!("{given:?}"))
}

/// Checks what a state can be told beyond [`check_config`].
pub(super) fn check_state(geometry: HeadGeometry, config: &HybridConfig) -> Result<()> {
    check_config(geometry, config)?;
    let supported = matches!(config.router, Router::SelfSaliency | Router::None);
    require(supported, "router", "self_saliency or none in a state on CUDA", || {
        format!("{:?}", config.router)
    })?;
    let group = geometry.num_heads / geometry.selection_heads(config.selection_head);
    let shared = group <= MAX_DECODE_GROUP;
    require(shared, "num_heads", "at most 16 query heads a KV head in a state on CUDA", || {
        format!("{group} a KV head")
    })
}

pub(super) fn require(
    holds: bool,
    what: &'static str,
    expected: &'static str,
    got: impl FnOnce() -> String,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(AttentionError::Unsupported { op: OP, tensor: what, expected, got: got() })
}
