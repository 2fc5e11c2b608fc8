//! The backward pass.

use std::ptr::null_mut;

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};
use still_kernels::{Backward, Rows, check, still_backward, still_backward_bytes};

use super::forward::{Operands, Saved};
use super::layout::{rows_aligned, uninit};
use crate::saved_attention::FoldedGradients;
use still_compute::cuda::{Launch, on_cuda};

/// A gradient that the kernels fill.
struct Gradient {
    storage: CudaStorage,
    layout: Layout,
}

impl Gradient {
    fn new(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<Self> {
        // SAFETY: the backward pass fills it.
        let storage = unsafe { device.alloc_uninit(shape, dtype)? };
        Ok(Self { storage, layout: Layout::contiguous(shape) })
    }

    fn tensor(self) -> Tensor {
        let shape = self.layout.shape().clone();
        Tensor::from_storage(Storage::Cuda(self.storage), shape, BackpropOp::none(), false)
    }
}

/// Queues the backward pass of what [`super::forward::forward`] has left. Gradients of the maps and the scale are f32.
pub(super) fn backward(
    device: &CudaDevice,
    operands: &Operands,
    saved: &Saved,
    out: &Tensor,
    d_out: &Tensor,
) -> Result<FoldedGradients> {
    let Operands { shape, q, k, v, map_q, map_k, log_scale, gate, routing } = operands;
    let dims = q.dims4()?;
    let host_budgets = routing.host_budgets().as_ptr();
    // SAFETY: reads the shape and a budget of every KV head.
    let bytes = unsafe { still_backward_bytes(shape, host_budgets) };
    let scratch: CudaSlice<u8> =
        uninit(device, usize::try_from(bytes).map_err(candle_core::Error::wrap)?)?;
    let like = |tensor: &Tensor| Gradient::new(device, tensor.shape(), tensor.dtype());
    let learned = |tensor: &Tensor| Gradient::new(device, tensor.shape(), DType::F32);
    let (d_q, d_k, d_v) = (like(q)?, like(k)?, like(v)?);
    let (d_map_q, d_map_k) = (learned(map_q)?, learned(map_k)?);
    let d_log_scale = log_scale.as_ref().map(learned).transpose()?;

    let d_out = rows_aligned(d_out)?;
    // Of the linear branch's numerator, and of the gate.
    let gated = match gate {
        Some(gate) => Some((rows_aligned(&(&d_out * gate)?)?, like(gate)?)),
        None => None,
    };
    let d_linear = gated.as_ref().map_or(&d_out, |(d_linear, _)| d_linear);
    let stream = device.cuda_stream();
    let held = [q, k, v, out, &d_out, d_linear, map_q, map_k].map(Tensor::storage_and_layout);
    let held_scale = log_scale.as_ref().map(Tensor::storage_and_layout);
    let mut launch = Launch::new(&stream)?;
    let [q, k, v, out, d_out, d_linear, map_q, map_k] = &held;
    let args = Backward {
        q: launch.rows(on_cuda(&q.0)?, q.1)?,
        k: launch.rows(on_cuda(&k.0)?, k.1)?,
        v: launch.rows(on_cuda(&v.0)?, v.1)?,
        out: launch.rows(on_cuda(&out.0)?, out.1)?,
        d_out: launch.rows(on_cuda(&d_out.0)?, d_out.1)?,
        d_q: launch.rows(&d_q.storage, &d_q.layout)?,
        d_k: launch.rows(&d_k.storage, &d_k.layout)?,
        d_v: launch.rows(&d_v.storage, &d_v.layout)?,
        w_q: launch.values(on_cuda(&map_q.0)?, map_q.1)?,
        w_k: launch.values(on_cuda(&map_k.0)?, map_k.1)?,
        log_scale: launch.optional_values(&held_scale)?,
        routing: routing.args(&mut launch),
        phi: launch.at(&saved.phi),
        s: launch.at(&saved.s),
        z: launch.at(&saved.z),
        denominator: launch.at(&saved.denominator),
        maximum: launch.at_optional(saved.maximum.as_ref()),
        arg_max: launch.at_optional(saved.arg_max.as_ref()),
        d_w_q: launch.values(&d_map_q.storage, &d_map_q.layout)?,
        d_w_k: launch.values(&d_map_k.storage, &d_map_k.layout)?,
        d_log_scale: match &d_log_scale {
            Some(gradient) => launch.values(&gradient.storage, &gradient.layout)?,
            None => null_mut(),
        },
        host_budgets,
        linear: saved.linear_rows(&mut launch, dims),
        d_linear: launch.rows(on_cuda(&d_linear.0)?, d_linear.1)?,
        d_gate: match &gated {
            Some((_, d_gate)) => launch.rows(&d_gate.storage, &d_gate.layout)?,
            None => Rows::NONE,
        },
        scratch: launch.at(&scratch),
    };
    // SAFETY: every buffer is as large as still.h says for `shape`, and lives until the launch is dropped.
    let code = unsafe { still_backward(shape, &args, launch.stream()) };
    check("still_backward", code).map_err(candle_core::Error::wrap)?;
    drop(launch);
    drop(held);
    drop(held_scale);
    Ok(FoldedGradients {
        qkv: Some([d_q.tensor(), d_k.tensor(), d_v.tensor()]),
        gate: gated.map(|(_, d_gate)| d_gate.tensor()),
        map_q: d_map_q.tensor(),
        map_k: d_map_k.tensor(),
        log_scale: d_log_scale.map(Gradient::tensor),
    })
}
