//! `x Wᵀ + b` with a weight that never trains.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// `x` `[…, in]` times `weight` `[out, in]` transposed, plus `bias` `[out]`: `[…, out]`.
///
/// The gradient flows to `x` alone.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inner.max(1);
    let flat = x.contiguous()?.reshape((rows, inner))?;
    let y = flat.apply_op1(FrozenLinear { weight: weight.clone() })?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    y.reshape(shape)
}

struct FrozenLinear {
    weight: Tensor,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = layout.shape().dims2()?;
        let weight = self.weight.t()?;
        let (storage, weight_layout) = weight.storage_and_layout();
        let candle_core::Storage::Cpu(w) = &*storage else {
            candle_core::bail!("frozen_linear: the input is on the CPU, the weight is not")
        };
        let out = weight.dim(1)?;
        let y = x.matmul(w, (1, rows, out, inner), layout, weight_layout)?;
        Ok((y, Shape::from((rows, out))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.contiguous()?.matmul(&self.weight)?))
    }
}
