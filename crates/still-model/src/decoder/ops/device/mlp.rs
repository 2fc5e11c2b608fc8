use candle_core::{Result, Tensor};

use super::linear::{rows, times_transposed};
use super::{composed, norm};
use crate::decoder::{MlpWeights, Weight};

/// [`super::super::mlp`], its sizes checked.
pub(in super::super) fn mlp(x: &Tensor, weights: &MlpWeights) -> Result<Tensor> {
    let [gate_w, up_w, down_w] = [&weights.gate, &weights.up, &weights.down].map(Weight::dense);
    let (gate_w, up_w, down_w) = (gate_w?.clone(), up_w?.clone(), down_w?.clone());
    let (norm_w, eps) = (weights.norm.clone(), weights.rms_norm_eps);
    let detached = x.detach().contiguous()?;
    let normed = rows(&candle_nn::ops::rms_norm(&detached, &norm_w, eps as f32)?)?;
    let (gate, up) = (times_transposed(&normed, &gate_w)?, times_transposed(&normed, &up_w)?);
    let hidden = (gate.silu()? * &up)?;
    let value = (times_transposed(&hidden, &down_w)?.reshape(x.shape())? + &detached)?;
    if !x.track_op() {
        return Ok(value);
    }
    drop(hidden);
    composed::of_one(x, value, move |x, dy| {
        let d_hidden = rows(dy)?.matmul(&down_w)?;
        let sigmoid = candle_nn::ops::sigmoid(&gate)?;
        let silu = (&gate * &sigmoid)?;
        // silu' = σ + silu (1 − σ)
        let slope = ((&silu * sigmoid.affine(-1.0, 1.0)?)? + &sigmoid)?;
        let d_up = (&d_hidden * silu)?;
        let d_gate = ((d_hidden * &up)? * slope)?;
        let d_normed = (d_gate.matmul(&gate_w)? + d_up.matmul(&up_w)?)?.reshape(x.shape())?;
        dy + norm::backward(x, &norm_w, eps, &d_normed)?
    })
}
