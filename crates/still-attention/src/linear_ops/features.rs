//! The feature map of rows, and its gradients.

use candle_core::{D, Result, Tensor};

use crate::config::FeatureMap;

/// Rows that went through a map: `φ(x) = [softmax(u) ; softmax(−u)]`, `u = f` or, of the NP-Map, `‖x‖ f/‖f‖`, `f = x W`.
#[derive(Debug)]
pub(super) struct Mapped {
    map: FeatureMap,
    /// `[B, heads, N, D]`
    x: Tensor,
    /// `[heads, D, F]`
    w: Tensor,
    /// `[B, heads, N, F]`
    f: Tensor,
    /// `[B, heads, N, 2F]`
    pub phi: Tensor,
}

impl Mapped {
    /// Of `x` `[B, heads, N, D]` by `w` `[heads, D, F]`, both of one dtype, f32 on CUDA.
    pub fn new(map: FeatureMap, x: &Tensor, w: &Tensor) -> Result<Self> {
        let (x, w) = (x.contiguous()?, w.contiguous()?);
        let f = x.broadcast_matmul(&w.unsqueeze(0)?)?;
        let phi = on_device::features(&f, lengths_of(map, &x))?;
        Ok(Self { map, x, w, f, phi })
    }

    /// The gradients of `w` `[heads, D, F]` and, if it is wanted, of `x`, from that of `φ`.
    pub fn backward(&self, d_phi: &Tensor, wants_x: bool) -> Result<(Tensor, Option<Tensor>)> {
        let Self { map, x, w, f, phi } = self;
        let (d_f, through_length) =
            on_device::features_backward(f, lengths_of(*map, x), phi, d_phi)?;
        let d_w = x.transpose(2, 3)?.contiguous()?.matmul(&d_f)?.sum(0)?;
        if !wants_x {
            return Ok((d_w, None));
        }
        let d_x = d_f.broadcast_matmul(&w.transpose(1, 2)?.contiguous()?.unsqueeze(0)?)?;
        let d_x = through_length.map_or(Ok(d_x.clone()), |through| d_x + through)?;
        Ok((d_w, Some(d_x)))
    }
}

/// The rows whose length `u` has, if it has.
fn lengths_of(map: FeatureMap, x: &Tensor) -> Option<&Tensor> {
    match map {
        FeatureMap::NpMap { .. } => Some(x),
        FeatureMap::Softmax => None,
    }
}

/// The kernels where there are some, else tensor ops.
mod on_device {
    use super::{Result, Tensor, ops};

    pub(super) fn features(f: &Tensor, x: Option<&Tensor>) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if f.device().is_cuda() {
            return crate::cuda::features(f, x);
        }
        ops::features(f, x)
    }

    pub(super) fn features_backward(
        f: &Tensor,
        x: Option<&Tensor>,
        phi: &Tensor,
        d_phi: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if f.device().is_cuda() {
            return crate::cuda::features_backward(f, x, phi, d_phi);
        }
        ops::features_backward(f, x, phi, d_phi)
    }
}

/// As `still_features` and `still_features_backward` of still.h have it.
mod ops {
    use super::{D, Result, Tensor};

    /// The smallest length that is divided by.
    const MIN_LENGTH: f64 = 1e-12;

    fn length(x: &Tensor) -> Result<Tensor> {
        x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()
    }

    pub(super) fn features(f: &Tensor, x: Option<&Tensor>) -> Result<Tensor> {
        let u = match x {
            None => f.clone(),
            Some(x) => {
                f.broadcast_mul(&length(x)?.broadcast_div(&length(f)?.maximum(MIN_LENGTH)?)?)?
            }
        };
        Tensor::cat(&[softmax(&u)?, softmax(&u.neg()?)?], D::Minus1)
    }

    fn softmax(x: &Tensor) -> Result<Tensor> {
        let powers = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
        powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
    }

    pub(super) fn features_backward(
        f: &Tensor,
        x: Option<&Tensor>,
        phi: &Tensor,
        d_phi: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let width = f.dim(D::Minus1)?;
        let half = |first: usize| {
            let narrow = |x: &Tensor| x.narrow(D::Minus1, first, width);
            let (phi, d_phi) = (narrow(phi)?, narrow(d_phi)?);
            let mean = (&phi * &d_phi)?.sum_keepdim(D::Minus1)?;
            phi * d_phi.broadcast_sub(&mean)?
        };
        let d_u = (half(0)? - half(width)?)?;
        let Some(x) = x else { return Ok((d_u, None)) };
        let (of_x, of_f) = (length(x)?, length(f)?.maximum(MIN_LENGTH)?);
        let along = (f * &d_u)?.sum_keepdim(D::Minus1)?;
        let back = f.broadcast_mul(&along.broadcast_div(&of_f.sqr()?)?)?;
        let d_f = (d_u - back)?.broadcast_mul(&of_x.broadcast_div(&of_f)?)?;
        // A row of zeros has no direction in which its length grows.
        let d_length = along.broadcast_div(&(of_f * of_x.maximum(1e-30)?)?)?;
        Ok((d_f, Some(x.broadcast_mul(&d_length)?)))
    }
}
