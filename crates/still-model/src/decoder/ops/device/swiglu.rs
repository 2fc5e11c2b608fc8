use candle_core::{Result, Tensor};

/// `silu(gate) ⊙ up`.
pub(in crate::decoder) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return super::kernels::swiglu(gate, up);
    }
    gate.silu()? * up
}

/// Gradients of `gate` and `up`.
pub(in crate::decoder) fn backward(
    gate: &Tensor,
    up: &Tensor,
    d_hidden: &Tensor,
) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return super::kernels::swiglu_backward(gate, up, d_hidden);
    }
    let sigmoid = candle_nn::ops::sigmoid(gate)?;
    let silu = (gate * &sigmoid)?;
    // silu' = σ + silu (1 − σ)
    let slope = ((&silu * sigmoid.affine(-1.0, 1.0)?)? + &sigmoid)?;
    Ok([((d_hidden * up)? * slope)?, (d_hidden * silu)?])
}
