use candle_core::{Result, Tensor};

use crate::config::Activation;
use still_compute::rows::{GELU_CUBE, GELU_SLOPE};

/// `activation(gate) ⊙ up`.
pub(in crate::decoder) fn forward(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        if activation != Activation::Silu {
            candle_core::bail!("gated: no kernel for {activation:?} on CUDA, expected Silu")
        }
        return super::kernels::swiglu(gate, up);
    }
    gate.mul(&sigmoid(activation, gate)?)? * up
}

/// Gradients of `gate` and `up`.
pub(in crate::decoder) fn backward(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    d_hidden: &Tensor,
) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        if activation != Activation::Silu {
            candle_core::bail!("gated: no kernel for {activation:?} on CUDA, expected Silu")
        }
        return super::kernels::swiglu_backward(gate, up, d_hidden);
    }
    let sigmoid = sigmoid(activation, gate)?;
    let activated = (gate * &sigmoid)?;
    // (x σ(z))' = σ + x σ (1 − σ) z'
    let bent = (&activated * sigmoid.affine(-1.0, 1.0)?)?;
    let bent = match activation {
        Activation::Silu => bent,
        Activation::GeluTanh => {
            let slope = gate.sqr()?.affine(3.0 * GELU_CUBE * GELU_SLOPE, GELU_SLOPE)?;
            (bent * slope)?
        }
    };
    let slope = (bent + &sigmoid)?;
    Ok([((d_hidden * up)? * slope)?, (d_hidden * activated)?])
}

/// `σ(z(x))`, see [`super::super::activation`].
fn sigmoid(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => candle_nn::ops::sigmoid(x),
        Activation::GeluTanh => {
            let cube = x.sqr()?.affine(GELU_CUBE, 1.0)?.mul(x)?;
            candle_nn::ops::sigmoid(&(cube * GELU_SLOPE)?)
        }
    }
}
