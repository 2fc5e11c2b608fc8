//! Root-mean-square normalisation with a weight that never trains.

use candle_core::{DType, Result, Tensor};
use still_compute::Real;

use super::{composed, device, with_values};

/// `x / √(mean(x²) + ε) ⊙ weight` over the last axis; the gradient flows to `x` alone.
///
/// # Errors
/// A weight of another length, a dtype without a kernel.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return device::rms_norm(x, weight, eps);
    }
    match x.dtype() {
        DType::F32 => on_cpu::<f32>(x, weight, eps),
        DType::F64 => on_cpu::<f64>(x, weight, eps),
        other => candle_core::bail!("rms_norm: no kernel for {other:?}, expected f32 or f64"),
    }
}

fn on_cpu<T: Real>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let width = weight.dims1()?;
    if x.dims().last() != Some(&width) {
        candle_core::bail!("rms_norm: weight of {width} values for x {:?}", x.dims())
    }
    let (x, weight) = (x.contiguous()?, weight.detach());
    let y =
        with_values(&x, |x: &[T]| with_values(&weight, |weight| T::par_rms_norm(x, weight, eps)))??;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    composed::of_one(&x, y, move |x, dy| {
        let mut dx = vec![T::zero(); x.elem_count()];
        with_values(x, |x| {
            with_values(&weight, |weight| {
                with_values(dy, |dy| T::par_rms_norm_backward(x, weight, eps, dy, &mut dx))
            })
        })???;
        Tensor::from_vec(dx, x.shape(), x.device())
    })
}

/// [`rms_norm`] of every head on its own: `x` `[B, N, H·D]`, `weight` `[D]`.
///
/// # Errors
/// A width that the weight's length does not divide, a dtype without a kernel.
pub fn rms_norm_heads(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let head_dim = weight.dims1()?;
    if head_dim == 0 || !width.is_multiple_of(head_dim) {
        candle_core::bail!("rms_norm_heads: x is {:?}, heads have {head_dim} channels", x.dims())
    }
    let heads = x.reshape((batch, tokens, width / head_dim, head_dim))?;
    rms_norm(&heads, weight, eps)?.reshape((batch, tokens, width))
}
