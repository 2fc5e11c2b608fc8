//! The frozen half of a layer in one op: `x + down(silu(gate(n)) ⊙ up(n))`, `n` the norm of `x`.
//!
//! As separate ops its wide activations would each be a node whose gradient is allocated, zeroed and added to.

use std::marker::PhantomData;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use still_compute::Real;
use still_compute::matmul::{Mat, par_matmul, par_matmul_new};

use super::residual::add_into;
use super::{device, rms_norm, slice, swiglu, with_values};
use crate::decoder::Linear;

/// The frozen weights of one MLP.
#[derive(Clone, Debug)]
pub struct MlpWeights {
    /// Norm before it, `[E]`.
    pub norm: Tensor,
    /// `[I, E]`
    pub gate: Linear,
    /// `[I, E]`
    pub up: Linear,
    /// `[E, I]`
    pub down: Linear,
    /// ε of the norm.
    pub rms_norm_eps: f64,
}

/// `x` `[…, E]` plus the MLP of its norm. The gradient flows to `x` alone; with `keep` its two wide activations are kept for
/// that, otherwise computed again.
///
/// # Errors
/// Weights of other sizes, a dtype without a kernel.
pub fn mlp(x: &Tensor, weights: &MlpWeights, keep: bool) -> Result<Tensor> {
    let (inner, width) = weights.gate.weight.dims2()?;
    let fits = x.dims().last() == Some(&width)
        && weights.norm.dims() == [width]
        && weights.gate.fits(inner, width)?
        && weights.up.fits(inner, width)?
        && weights.down.fits(width, inner)?;
    if !fits {
        candle_core::bail!("mlp: x is {:?}, gate {:?}", x.dims(), (inner, width))
    }
    if !x.device().is_cpu() {
        return device::mlp(x, weights, keep);
    }
    let x = x.contiguous()?;
    let keep = keep && x.track_op();
    match x.dtype() {
        DType::F32 => x.apply_op1(Mlp::<f32>::new(weights, keep)),
        DType::F64 => x.apply_op1(Mlp::<f64>::new(weights, keep)),
        other => candle_core::bail!("mlp: no kernel for {other:?}, expected f32 or f64"),
    }
}

struct Mlp<T> {
    weights: MlpWeights,
    /// `gate(n)` and `up(n)`, if they are kept for the backward pass.
    saved: OnceLock<(Vec<T>, Vec<T>)>,
    keep: bool,
    dtype: PhantomData<fn() -> T>,
}

impl<T: Real> Mlp<T> {
    fn new(weights: &MlpWeights, keep: bool) -> Self {
        Self { weights: weights.clone(), saved: OnceLock::new(), keep, dtype: PhantomData }
    }

    /// `(rows, inner, width)` of a call.
    fn sizes(&self, values: usize) -> Result<(usize, usize, usize)> {
        let (inner, width) = self.weights.gate.weight.dims2()?;
        Ok((values / width, inner, width))
    }

    /// `gate(n)` and `up(n)`.
    fn wide(&self, x: &[T]) -> Result<(Vec<T>, Vec<T>)> {
        let w = &self.weights;
        let normed = with_values(&w.norm, |norm| rms_norm::forward(x, norm, w.rms_norm_eps))?;
        Ok((w.gate.multiply(&normed)?, w.up.multiply(&normed)?))
    }

    fn forward(&self, x: &[T]) -> Result<Vec<T>> {
        let w = &self.weights;
        let (gate, up) = self.wide(x)?;
        // Without a backward pass to come, the activation can take the place of `gate`.
        let hidden = if self.keep {
            let hidden = swiglu::forward(&gate, &up);
            // A second forward of one op would compute the same.
            let _ = self.saved.set((gate, up));
            hidden
        } else {
            swiglu::forward_in_place(gate, &up)
        };
        let mut y = w.down.multiply(&hidden)?;
        add_into(&mut y, x);
        Ok(y)
    }

    fn backward(&self, x: &[T], dy: &[T]) -> Result<Vec<T>> {
        let (rows, inner, width) = self.sizes(x.len())?;
        let w = &self.weights;
        let again;
        let (gate, up) = match self.saved.get() {
            Some(saved) => saved,
            None => {
                again = self.wide(x)?;
                &again
            }
        };
        let mut d_up = w.down.weight.with_values(|down| {
            par_matmul_new((rows, inner, width), Mat::rows(dy, width), Mat::rows(down, inner))
        })?;
        let d_gate = swiglu::backward(gate, up, &mut d_up);
        let mut d_normed = vec![T::zero(); rows * width];
        for (i, (d, weight)) in
            [(&d_gate, &w.gate.weight), (&d_up, &w.up.weight)].into_iter().enumerate()
        {
            weight.with_values(|weight| {
                let (d, weight) = (Mat::rows(d, inner), Mat::rows(weight, width));
                par_matmul((rows, width, inner), &mut d_normed, width, i > 0, d, weight);
            })?;
        }
        let mut dx = dy.to_vec();
        with_values(&w.norm, |norm| {
            rms_norm::add_backward(x, norm, w.rms_norm_eps, &d_normed, &mut dx);
        })?;
        Ok(dx)
    }
}

impl<T: Real> CustomOp1 for Mlp<T> {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(slice(x, layout)?)?;
        Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values(x, |x| with_values(dy, |dy| self.backward(x, dy)))???;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
