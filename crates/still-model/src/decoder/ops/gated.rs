//! The gated half of an MLP in one op: `activation(gate(x)) ⊙ up(x)`.
//!
//! As separate ops its wide activations would each be a node whose gradient is allocated, zeroed and added to.

use candle_core::{D, Result, Tensor};

use super::linear::rows;
use super::plain::{self, activated, activated_backward, linear, linear_backward};
use super::{composed, of_width};
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
    if x.dim(D::Minus1)? != width || !gate.fits(inner, width)? || !up.fits(inner, width)? {
        candle_core::bail!("gated: x is {:?}, gate {:?}", x.dims(), (inner, width))
    }
    super::check_dtype("gated", x)?;
    let (x_rows, shape) = (rows(&x.detach())?, of_width(x, inner));
    if !x.track_op() {
        return plain::gated(&x_rows, gate, up, activation)?.reshape(shape);
    }
    let wide = [linear(&x_rows, gate)?, linear(&x_rows, up)?];
    let hidden = activated(activation, &wide[0], &wide[1])?.reshape(shape)?;
    let (gate, up) = (gate.weight.clone(), up.weight.clone());
    composed::of_one(x, hidden, move |x, dy| {
        let [d_gate, d_up] = activated_backward(activation, &wide[0], &wide[1], &rows(dy)?)?;
        linear_backward(&[(&d_gate, &gate), (&d_up, &up)], None)?.reshape(x.shape())
    })
}
