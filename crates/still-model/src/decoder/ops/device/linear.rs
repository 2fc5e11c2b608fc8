use candle_core::{DType, Result, Tensor};
#[cfg(feature = "cuda")]
use still_compute::cuda::Gemm;

use super::composed;
use crate::decoder::Lora;

/// [`super::super::frozen_linear`] without bias, the weight `[out, in]` in `x`'s dtype.
pub(in super::super) fn frozen_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let value = times_transposed(&x.detach(), weight)?;
    let weight = weight.detach();
    composed::of_one(x, value, move |x, dy| rows(dy)?.matmul(&weight)?.reshape(x.shape()))
}

/// [`super::super::low_rank_linear`]; `A` and `B` are f32 whatever `x` is, and so are their gradients.
pub(in super::super) fn low_rank_linear(
    x: &Tensor,
    weight: &Tensor,
    lora: &Lora,
) -> Result<Tensor> {
    let dtype = x.dtype();
    let scale = lora.scale;
    let mask = match &lora.dropout {
        Some(dropout) => Some(dropout.mask(x.elem_count(), x.device())?),
        None => None,
    };
    let dropped = move |x: Tensor| match &mask {
        Some(mask) => x.mul(&mask.to_dtype(dtype)?.reshape(x.shape())?),
        None => Ok(x),
    };
    let rounded = |tensor: &Tensor| tensor.detach().to_dtype(dtype);
    let low = move |x: &Tensor, a: &Tensor| x.matmul(&a.t()?)? * scale;

    let (a, b) = (rounded(&lora.a)?, rounded(&lora.b)?);
    let x_rows = rows(&x.detach())?;
    let update = low(&dropped(x_rows.clone())?, &a)?.matmul(&b.t()?)?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    let value = (x_rows.matmul(&weight.t()?)? + update)?.reshape(shape)?;
    let weight = weight.detach();
    composed::of_three([x, &lora.a, &lora.b], value, move |[x, a, b], dy| {
        let (a32, b32) = (a, b);
        let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
        let (x_rows, dy) = (rows(x)?, rows(dy)?);
        let up = (dy.matmul(&b)? * scale)?;
        let dx = (dy.matmul(&weight)? + dropped(up.matmul(&a)?)?)?;
        let x_rows = dropped(x_rows)?;
        let da = up.t()?.matmul(&x_rows)?.to_dtype(a32.dtype())?;
        let db = dy.t()?.matmul(&low(&x_rows, &a)?)?.to_dtype(b32.dtype())?;
        Ok([dx.reshape(x.shape())?, da, db])
    })
}

/// [`super::super::wide_linear`].
pub(in super::super) fn wide_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.dtype() == DType::BF16 && x.device().is_cuda() {
        return still_compute::cuda::gemm(x, &weight.t()?, Gemm::to(DType::F32));
    }
    x.detach().contiguous()?.matmul(&weight.detach().t()?)?.to_dtype(DType::F32)
}

/// `x Wᵀ`, `[…, in]` → `[…, out]`.
pub(super) fn times_transposed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    rows(x)?.matmul(&weight.t()?)?.reshape(shape)
}

/// [`times_transposed`] plus a bias, if there is one.
pub(super) fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = times_transposed(x, weight)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `[…, width]` as a matrix.
pub(in crate::decoder) fn rows(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    x.contiguous()?.reshape(((), width))
}
