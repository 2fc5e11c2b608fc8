use candle_core::{D, DType, Result, Tensor};

use crate::decoder::ops::composed;

/// [`super::super::rms_norm`], the weight in `x`'s dtype.
pub(in super::super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let detached = x.detach().contiguous()?;
    #[cfg(feature = "cuda")]
    let own = super::kernels::rms_norm(&detached, weight, eps)?;
    #[cfg(not(feature = "cuda"))]
    let own = None;
    let value = match own {
        Some(value) => value,
        None => candle_nn::ops::rms_norm(&detached, weight, eps as f32)?,
    };
    let weight = weight.detach();
    composed::of_one(x, value, move |x, dy| backward(x, &weight, eps, dy, None))
}

/// The gradient of `x`, summed in f32, given in `x`'s dtype; on top of `add`, if that is given.
pub(in crate::decoder) fn backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
    add: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::kernels::rms_norm_backward(x, weight, eps, dy, add);
    }
    let [x32, dy32, weight] = [x, dy, weight].map(|tensor| tensor.to_dtype(DType::F32));
    let x32 = x32?;
    let scale = (x32.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let normed = x32.broadcast_mul(&scale)?;
    let weighted = dy32?.broadcast_mul(&weight?)?;
    let along = (&weighted * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = (weighted - normed.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    let dx = dx.to_dtype(x.dtype())?;
    match add {
        Some(add) => dx + add,
        None => Ok(dx),
    }
}
