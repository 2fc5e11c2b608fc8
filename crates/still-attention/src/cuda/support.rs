//! What the kernels compute, and errors that name what they do not.

use candle_core::{DType, Device, Tensor};
use still_kernels::dense::DENSE_DECODE_HEAD_DIMS;

use super::graph_state::StepRotation;
use crate::arguments::expect_rows;
use crate::limits::{Asked, Use};
use crate::output::OP;
use crate::{
    AttentionError, HeadGeometry, HybridConfig, HybridWeights, Mode, Result, Router, RowDtype,
    limits,
};

/// Checks a call whose shapes fit each other.
pub(super) fn check(
    q: &Tensor,
    key_side: [&Tensor; 2],
    gate: Option<&Tensor>,
    weights: &HybridWeights,
    (geometry, config): (HeadGeometry, &HybridConfig),
    trains: bool,
) -> Result<()> {
    let used_in = if trains { Use::Training } else { Use::Forward };
    limits::check(Asked { geometry, config, dtype: q.dtype(), used_in })?;
    check_gate(q, gate)?;
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

/// What the rotated channels of a head are a multiple of where a step rotates.
const ROTARY_UNIT: usize = 16;

/// Whether a step can rotate the first `rotary` channels of queries and keys.
pub(super) fn rotates(rotary: usize) -> bool {
    rotary.is_multiple_of(ROTARY_UNIT)
}

/// Checks what a step of `batch` sequences rotates heads of `head_dim` channels by.
pub(super) fn check_rotation(
    StepRotation { cos, sin }: StepRotation<'_>,
    batch: usize,
    head_dim: usize,
) -> Result<()> {
    for (name, angles) in [("cos", cos), ("sin", sin)] {
        let rotary = 2 * angles.elem_count() / batch;
        let fits = angles.dtype() == DType::F32 && rotary <= head_dim && rotates(rotary);
        require(fits, name, "f32, a row for each sequence", || {
            format!("{:?} {}", angles.dims(), angles.dtype().as_str())
        })?;
    }
    Ok(())
}

/// Checks an output gate whose shape is that of `q`.
pub(super) fn check_gate(q: &Tensor, gate: Option<&Tensor>) -> Result<()> {
    let Some(gate) = gate else { return Ok(()) };
    check_device("gate", gate, q)?;
    require(gate.dtype() == q.dtype(), "gate", "of q's dtype", || gate.dtype().as_str().into())
}

pub(super) fn check_dtype(what: &'static str, dtype: DType) -> Result<()> {
    require(matches!(dtype, DType::F32 | DType::BF16), what, "f32 or bf16 on CUDA", || {
        dtype.as_str().into()
    })
}

/// Checks how a state whose rows come in `dtype` keeps those that it keeps for good.
pub(super) fn check_row_dtype(rows: RowDtype, dtype: DType) -> Result<()> {
    let plain =
        matches!((rows, dtype), (RowDtype::F32, DType::F32) | (RowDtype::Bf16, DType::BF16));
    let expected = "as the activations, int8 or int4 on CUDA";
    require(plain || rows.is_coded(), "rows", expected, || {
        format!("{rows}, the activations are {}", dtype.as_str())
    })
}

/// Checks that a router can rank rows that are kept as `rows`.
pub(super) fn check_router(rows: RowDtype, router: Router) -> Result<()> {
    let recalled = rows.is_coded() && router == Router::SelfRecall;
    require(!recalled, "router", "another than self_recall with int8 or int4 rows on CUDA", || {
        format!("{router:?}")
    })
}

/// Checks that the rows of a dense cache, which come in `dtype`, can be kept as `rows`.
pub(super) fn check_dense_rows(rows: RowDtype, dtype: DType, head_dim: usize) -> Result<()> {
    let expected = "int8 or as the activations with dense attention in bf16 on CUDA, int4 in f32";
    let exact = rows != RowDtype::Int4 || dtype == DType::F32;
    require(exact, "rows", expected, || format!("{rows} in {}", dtype.as_str()))?;
    let expected = "64, 80, 96, 128 or 256 with int8 or int4 rows on CUDA";
    let fits = !rows.is_coded() || DENSE_DECODE_HEAD_DIMS.contains(&head_dim);
    require(fits, "head_dim", expected, || head_dim.to_string())
}

fn check_device(name: &'static str, tensor: &Tensor, q: &Tensor) -> Result<()> {
    require(tensor.device().same_device(q.device()), name, "a tensor on q's device", || {
        format!("on {:?}", tensor.device().location())
    })
}

/// Checks what a state with kernels of its own can be told.
pub(super) fn check_state(
    geometry: HeadGeometry,
    config: &HybridConfig,
    dtype: DType,
) -> Result<()> {
    require(config.mode == Mode::Hybrid, "mode", "hybrid in this state", || {
        format!("{:?}", config.mode)
    })?;
    limits::check(Asked { geometry, config, dtype, used_in: Use::State })
}

/// Checks the scale of logits, if it is given.
pub(crate) fn check_logit_scale(given: Option<f64>, head_dim: usize) -> Result<()> {
    require(
        limits::is_usual(given, head_dim),
        "logit_scale",
        "the root of 1 / head_dim on CUDA",
        || format!("{given:?}"),
    )
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
