//! Root-mean-square normalisation with a weight that never trains.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;
use still_compute::{Real, vector};

use super::{ROWS_PER_TASK, composed, device, with_values};

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
    let y = with_values(&x, |x: &[T]| with_values(&weight, |weight| forward(x, weight, eps)))??;
    let y = Tensor::from_vec(y, x.shape(), x.device())?;
    composed::of_one(&x, y, move |x, dy| {
        let mut dx = vec![T::zero(); x.elem_count()];
        with_values(x, |x| {
            with_values(&weight, |weight| {
                with_values(dy, |dy| add_backward(x, weight, eps, dy, &mut dx))
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

#[inline(always)]
fn inverse_rms<T: Real>(x: &[T], eps: f64) -> T {
    let mean = vector::dot(x, x) / T::of(x.len() as f64);
    T::one() / (mean + T::of(eps)).sqrt()
}

/// The norm of every row of `x`.
pub(super) fn forward<T: Real>(x: &[T], weight: &[T], eps: f64) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let block = weight.len() * ROWS_PER_TASK;
    y.par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .for_each(|(y, x)| forward_rows(x, weight, eps, y));
    y
}

/// [`forward`] on this thread, into `y`.
pub(crate) fn forward_rows<T: Real>(x: &[T], weight: &[T], eps: f64, y: &mut [T]) {
    let width = weight.len();
    vector::vectorize(
        #[inline(always)]
        || {
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let scale = inverse_rms(x, eps);
                for i in 0..width {
                    y[i] = x[i] * scale * weight[i];
                }
            }
        },
    );
}

/// Adds the gradient of [`forward`] to `dx`.
pub(super) fn add_backward<T: Real>(x: &[T], weight: &[T], eps: f64, dy: &[T], dx: &mut [T]) {
    let width = weight.len();
    let rows = width * ROWS_PER_TASK;
    dx.par_chunks_mut(rows).zip(x.par_chunks(rows)).zip(dy.par_chunks(rows)).for_each(
        |((dx, x), dy)| {
            vector::vectorize(
                #[inline(always)]
                || {
                    let mut weighted = vec![T::zero(); width];
                    let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((dx, x), dy) in rows.zip(dy.chunks_exact(width)) {
                        let scale = inverse_rms(x, eps);
                        for i in 0..width {
                            weighted[i] = dy[i] * weight[i];
                        }
                        let along = vector::dot(&weighted, x) * scale * scale / T::of(width as f64);
                        for i in 0..width {
                            dx[i] += scale * (weighted[i] - x[i] * along);
                        }
                    }
                },
            );
        },
    );
}
