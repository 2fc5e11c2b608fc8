//! `x Wᵀ + b` with a weight that never trains.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use still_compute::Real;
use still_compute::matmul::{Mat, par_matmul_new};

use super::{device, slice, with_values};
use crate::decoder::Weight;

/// `x` `[…, in]` times `weight` `[out, in]` transposed, plus `bias` `[out]`: `[…, out]`.
///
/// The gradient flows to `x` alone.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn frozen_linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, inner) = weight.dims2()?;
    if x.dims().last() != Some(&inner) {
        candle_core::bail!("frozen_linear: x is {:?}, weight {:?}", x.dims(), weight.dims2()?)
    }
    let x = x.contiguous()?;
    let weight = weight.clone();
    let y = match x.dtype() {
        _ if !x.device().is_cpu() => device::frozen_linear(&x, weight.dense()?)?,
        DType::F32 => x.apply_op1(FrozenLinear::<f32> { weight, dtype: PhantomData })?,
        DType::F64 => x.apply_op1(FrozenLinear::<f64> { weight, dtype: PhantomData })?,
        other => candle_core::bail!("frozen_linear: no kernel for {other:?}, expected f32 or f64"),
    };
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

struct FrozenLinear<T> {
    weight: Weight,
    dtype: PhantomData<fn() -> T>,
}

impl<T: Real> CustomOp1 for FrozenLinear<T> {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.weight.multiply(slice::<T>(x, layout)?)?;
        let mut shape = layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.weight.dims2()?.0;
        }
        Ok((T::to_cpu_storage_owned(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (out, inner) = self.weight.dims2()?;
        let dx = with_values(dy, |dy: &[T]| {
            self.weight.with_values(|w| {
                let rows = dy.len() / out;
                par_matmul_new((rows, inner, out), Mat::rows(dy, out), Mat::rows(w, inner))
            })
        })??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
