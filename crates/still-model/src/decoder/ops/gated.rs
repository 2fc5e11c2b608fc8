//! The gated half of an MLP in one op: `activation(gate(x)) ⊙ up(x)`.
//!
//! As separate ops its wide activations would each be a node whose gradient is allocated, zeroed and added to.

use std::marker::PhantomData;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use still_compute::Real;
use still_compute::matmul::{Mat, par_matmul, par_matmul_new};

use super::{activation, device, slice, with_values};
use crate::config::Activation;
use crate::decoder::{Linear, NormWeight};

/// The frozen weights of one MLP.
#[derive(Clone, Debug)]
pub struct MlpWeights {
    /// Norm before it, `[E]`.
    pub norm: NormWeight,
    /// `[I, E]`
    pub gate: Linear,
    /// `[I, E]`
    pub up: Linear,
    /// `[E, I]`
    pub down: Linear,
    /// Of the gate.
    pub activation: Activation,
    /// Norm of what the MLP gives, before it is added, `[E]`; only some families have it.
    pub post_norm: Option<NormWeight>,
}

/// `activation(gate(x)) ⊙ up(x)` of `x` `[…, E]`: `[…, I]`. The gradient flows to `x` alone.
///
/// # Errors
/// Weights of other sizes, a dtype without a kernel.
pub fn gated(x: &Tensor, gate: &Linear, up: &Linear, activation: Activation) -> Result<Tensor> {
    let (inner, width) = gate.weight.dims2()?;
    let fits =
        x.dims().last() == Some(&width) && gate.fits(inner, width)? && up.fits(inner, width)?;
    if !fits {
        candle_core::bail!("gated: x is {:?}, gate {:?}", x.dims(), (inner, width))
    }
    if !x.device().is_cpu() {
        return device::gated(x, gate, up, activation);
    }
    let x = x.contiguous()?;
    let keep = x.track_op();
    match x.dtype() {
        DType::F32 => x.apply_op1(Gated::<f32>::new((gate, up, activation), keep)),
        DType::F64 => x.apply_op1(Gated::<f64>::new((gate, up, activation), keep)),
        other => candle_core::bail!("gated: no kernel for {other:?}, expected f32 or f64"),
    }
}

struct Gated<T> {
    gate: Linear,
    up: Linear,
    activation: Activation,
    /// `gate(x)` and `up(x)`, if there may be a backward pass.
    saved: OnceLock<(Vec<T>, Vec<T>)>,
    keep: bool,
    dtype: PhantomData<fn() -> T>,
}

impl<T: Real> Gated<T> {
    fn new((gate, up, activation): (&Linear, &Linear, Activation), keep: bool) -> Self {
        let (gate, up) = (gate.clone(), up.clone());
        Self { gate, up, activation, saved: OnceLock::new(), keep, dtype: PhantomData }
    }

    fn forward(&self, x: &[T]) -> Result<Vec<T>> {
        let (gate, up) = (self.gate.multiply(x)?, self.up.multiply(x)?);
        // Without a backward pass to come, the activation can take the place of `gate`.
        if !self.keep {
            return Ok(activation::forward_in_place(self.activation, gate, &up));
        }
        let hidden = activation::forward(self.activation, &gate, &up);
        // A second forward of one op would compute the same.
        let _ = self.saved.set((gate, up));
        Ok(hidden)
    }

    fn backward(&self, x: &[T], dy: &[T]) -> Result<Vec<T>> {
        let (inner, width) = self.gate.weight.dims2()?;
        let rows = x.len() / width;
        let again;
        let (gate, up) = match self.saved.get() {
            Some(saved) => saved,
            None => {
                again = (self.gate.multiply(x)?, self.up.multiply(x)?);
                &again
            }
        };
        let mut d_up = dy.to_vec();
        let d_gate = activation::backward(self.activation, gate, up, &mut d_up);
        let mut dx = self.gate.weight.with_values(|gate| {
            par_matmul_new((rows, width, inner), Mat::rows(&d_gate, inner), Mat::rows(gate, width))
        })?;
        self.up.weight.with_values(|up| {
            let (d, up) = (Mat::rows(&d_up, inner), Mat::rows(up, width));
            par_matmul((rows, width, inner), &mut dx, width, true, d, up);
        })?;
        Ok(dx)
    }
}

impl<T: Real> CustomOp1 for Gated<T> {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(slice(x, layout)?)?;
        let mut shape = layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.gate.weight.dims2()?.0;
        }
        Ok((T::to_cpu_storage_owned(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values(x, |x| with_values(dy, |dy| self.backward(x, dy)))???;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
