//! Products with frozen matrices, and with low-rank updates, in the graph.

use candle_core::{D, DType, Result, Tensor};

use super::plain::{self, by_codes, dropped, linear_backward, product};
use super::{composed, of_width};
use crate::decoder::{Linear, Lora, Weight};

/// `x` `[…, in]` times `weight` `[out, in]` transposed, plus `bias` `[out]`: `[…, out]`.
///
/// The gradient flows to `x` alone.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn frozen_linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    if x.dim(D::Minus1)? != inner {
        candle_core::bail!("frozen_linear: x is {:?}, weight {:?}", x.dims(), (out, inner))
    }
    super::check_dtype("frozen_linear", x)?;
    let frozen = Linear { weight: weight.clone(), bias: bias.map(Tensor::detach) };
    let y = plain::linear(&rows(&x.detach())?, &frozen)?.reshape(of_width(x, out))?;
    composed::of_one(x, y, move |x, dy| {
        linear_backward(&[(&rows(dy)?, &frozen.weight)], None)?.reshape(x.shape())
    })
}

/// [`frozen_linear`] without bias, plus the update `scale · (x Aᵀ) Bᵀ`. Dropout, if there is one, takes from the update's input
/// alone.
///
/// Gradients flow to `x`, `A` and `B`.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn low_rank_linear(x: &Tensor, weight: &Weight, lora: &Lora) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let (rank, _) = lora.a.dims2()?;
    let (a, b) = (lora.a.dims(), lora.b.dims());
    if x.dim(D::Minus1)? != inner || a != [rank, inner] || b != [out, rank] {
        candle_core::bail!(
            "low_rank_linear: x is {:?}, weight {:?}, A {a:?}, B {b:?}",
            x.dims(),
            (out, inner),
        )
    }
    super::check_dtype("low_rank_linear", x)?;
    let x_rows = rows(&x.detach())?;
    if ![x, &lora.a, &lora.b].into_iter().any(Tensor::track_op)
        && let Some(y) = plain::fused_linear(&x_rows, weight, Some(lora), None)?
    {
        return y.reshape(of_width(x, out));
    }
    let frozen = Linear { weight: weight.clone(), bias: None };
    let (y, update) = plain::low_rank(&x_rows, lora, plain::linear(&x_rows, &frozen)?)?;
    let (scale, dropout) = (lora.scale, lora.dropout);
    let y = y.reshape(of_width(x, out))?;
    composed::of_three([x, &lora.a, &lora.b], y, move |[x, a, b], dy| {
        let (x_rows, dy) = (rows(x)?, rows(dy)?);
        let up = update.up(&dy, scale)?;
        let through = update.through(&up, dropout.as_ref())?;
        let dx = linear_backward(&[(&dy, &frozen.weight)], Some(through))?;
        let da = product(&up.t()?, &dropped(&x_rows, dropout.as_ref())?, 1.0, None)?;
        let db = product(&dy.t()?, &update.low, scale, None)?;
        Ok([dx.reshape(x.shape())?, da.to_dtype(a.dtype())?, db.to_dtype(b.dtype())?])
    })
}

/// `onto` plus a projection of `x` with its update, if nothing here has a gradient and one kernel computes it all: `[…, out]`.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub(in crate::decoder) fn linear_onto(
    onto: &Tensor,
    x: &Tensor,
    weight: &Weight,
    lora: Option<&Lora>,
) -> Result<Option<Tensor>> {
    let learned = lora.into_iter().flat_map(|lora| [&lora.a, &lora.b]);
    if [onto, x].into_iter().chain(learned).any(Tensor::track_op) {
        return Ok(None);
    }
    let y = plain::fused_linear(&rows(x)?, weight, lora, Some(onto))?;
    y.map(|y| y.reshape(onto.shape())).transpose()
}

/// `x` `[rows, in]` times `weight` `[out, in]` transposed, in f32 whatever they are: logits, which rounding to bf16 would make
/// equal to each other. No gradient.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn wide_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.dtype() == DType::BF16 && x.device().is_cuda() {
        let options = still_compute::cuda::Gemm::to(DType::F32);
        return still_compute::cuda::gemm(x, &weight.t()?, options);
    }
    x.detach().contiguous()?.matmul(&weight.detach().t()?)?.to_dtype(DType::F32)
}

/// [`wide_linear`] of a matrix as it is stored.
pub(in crate::decoder) fn wide_product(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    match by_codes(x, weight, DType::F32)? {
        Some(y) => Ok(y),
        None => wide_linear(x, &weight.dense()?),
    }
}

/// `[…, width]` as a matrix.
pub(in crate::decoder) fn rows(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    x.contiguous()?.reshape(((), width))
}
