//! The differentiable op.
//!
//! candle's ops take three tensors, the operator has six. So that none need be packed and unpacked, two [`OperandGroup`]
//! stand for them in the graph, each a tensor of one value; the backward pass of [`Attention`] leaves there what theirs
//! hand on.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, CustomOp3, DType, Device, Layout, Shape,
    Tensor, bail,
};

use still_kernels::CHUNK;

use super::backward::backward;
use super::forward::{Operands, Saved, forward, forward_by_token};
use super::layout::{rows_aligned, shape};
use super::routing::DeviceRouting;
use super::support::LINEAR_ALONE;
use crate::hybrid::{HybridOutput, OP, check_given};
use crate::linear_branch::LinearBranch;
use crate::{AttentionError, HybridConfig, Result, Routing};

/// What the operator takes, still in its graph. `log_scale` is `ln(n λ)` per query head; none with `LinearNorm::Sum`.
pub(super) struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub map_q: Tensor,
    pub map_k: Tensor,
    pub log_scale: Option<Tensor>,
}

pub(super) fn hybrid_attention(
    inputs: Inputs,
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<HybridOutput> {
    let Inputs { q, k, v, map_q, map_k, log_scale } = inputs;
    let Device::Cuda(device) = q.device().clone() else {
        return Err(AttentionError::Config("expected a tensor on CUDA".into()));
    };
    let shape = shape(&q, k.dim(1)?)?;
    let (q_rows, k_rows, v_rows) = (rows_aligned(&q)?, rows_aligned(&k)?, rows_aligned(&v)?);
    let decided = decide(&device, &shape, [&q_rows, &k_rows], config, routing)?;
    if config.branches == LINEAR_ALONE {
        let branch = LinearBranch {
            q: &q,
            k: &k,
            v: &v,
            map_q: &map_q,
            map_k: &map_k,
            log_scale: log_scale.as_ref(),
            absorbed: &decided.absorbed()?,
            chunk: CHUNK,
        };
        return Ok(HybridOutput { out: branch.forward()?, routing: Routing::on_device(decided) });
    }
    let operands = Operands::new(
        shape,
        [q_rows, k_rows, v_rows],
        [&map_q, &map_k],
        log_scale.as_ref(),
        decided.clone(),
    )?;

    let third = log_scale.as_ref().unwrap_or(&map_k);
    let rows_train = [&q, &k, &v].iter().any(|tensor| tensor.track_op());
    let maps_train = [&map_q, &map_k, third].iter().any(|tensor| tensor.track_op());
    let out = if rows_train || maps_train {
        let (rows, maps) = (GroupGradients::default(), GroupGradients::default());
        let op = Attention {
            device,
            operands,
            saved: OnceLock::new(),
            rows: rows.clone(),
            maps: maps.clone(),
        };
        let rows = q.apply_op3(&k, &v, OperandGroup(rows))?;
        let maps = map_q.apply_op3(&map_k, third, OperandGroup(maps))?;
        rows.apply_op2(&maps, op)?
    } else {
        forward_by_token(&device, &operands, false, None)?.0
    };
    Ok(HybridOutput { out, routing: Routing::on_device(decided) })
}

/// The routing of a call: its own, or what was given, from wherever it lies.
fn decide(
    device: &CudaDevice,
    shape: &still_kernels::Shape,
    query_and_key: [&Tensor; 2],
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<DeviceRouting> {
    let dims = (shape.batch as usize, shape.kv_heads as usize, shape.tokens as usize);
    let Some(routing) = routing else {
        return DeviceRouting::decide(device, shape, query_and_key, config);
    };
    if let Some(there) = routing.device().filter(|there| there.device().same_device(device)) {
        return match there.dims() == dims {
            true => Ok(there.clone()),
            false => Err(AttentionError::Config(format!(
                "the given routing is of {:?} sequences, selection heads and tokens, expected {dims:?}",
                there.dims()
            ))),
        };
    }
    let selection = routing.selection()?;
    check_given(&selection, dims, config)?;
    DeviceRouting::given(device, shape, query_and_key, config, &selection)
}

/// Gradients on their way to the three tensors that an [`OperandGroup`] stands for.
type GroupGradients = Arc<Mutex<[Option<Tensor>; 3]>>;

/// `(three tensors) → [1]`, a value that means nothing.
struct OperandGroup(GroupGradients);

impl CustomOp3 for OperandGroup {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("{OP}: the graph of a CUDA tensor has no part on the CPU")
    }

    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let shape = Shape::from(1);
        Ok((storage.device.zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        third: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [a, b, c] = std::mem::take(&mut *gradients);
        Ok((
            a.filter(|_| first.track_op()),
            b.filter(|_| second.track_op()),
            c.filter(|_| third.track_op()),
        ))
    }
}

/// `(rows, maps) → [B, H, N, D]`: what it computes from is in `operands`.
struct Attention {
    device: CudaDevice,
    operands: Operands,
    saved: OnceLock<Saved>,
    rows: GroupGradients,
    maps: GroupGradients,
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("{OP}: the graph of a CUDA tensor has no part on the CPU")
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (out, saved) = forward(&self.device, &self.operands)?;
        // A second forward of one op object would be candle's doing, with the same result.
        let _ = self.saved.set(saved);
        Ok((out, self.operands.q.shape().clone()))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        maps: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(saved) = self.saved.get() else {
            bail!("{OP}: the backward pass follows the forward pass")
        };
        let to = backward(&self.device, &self.operands, saved, out, d_out)?;
        let hand = |place: &GroupGradients, gradients| {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = gradients;
        };
        hand(&self.rows, [Some(to.q), Some(to.k), Some(to.v)]);
        hand(&self.maps, [Some(to.map_q), Some(to.map_k), to.log_scale]);
        let reached = |tensor: &Tensor| tensor.track_op().then(|| tensor.zeros_like()).transpose();
        Ok((reached(rows)?, reached(maps)?))
    }
}
