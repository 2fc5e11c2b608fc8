use candle_core::{Result, Tensor};

use super::linear::{project, rows};
use super::{composed, norm, swiglu};
use crate::decoder::MlpWeights;

/// [`super::super::mlp`], its sizes checked.
pub(in super::super) fn mlp(x: &Tensor, weights: &MlpWeights, keep: bool) -> Result<Tensor> {
    let linears = [&weights.gate, &weights.up, &weights.down];
    let [gate_w, up_w, down_w] = linears.map(|linear| linear.weight.dense().cloned());
    let (gate_w, up_w, down_w) = (gate_w?, up_w?, down_w?);
    let [gate_b, up_b, down_b] = linears.map(|linear| linear.bias.clone());
    let (norm_w, eps) = (weights.norm.clone(), weights.rms_norm_eps);
    let detached = x.detach().contiguous()?;
    let wide = {
        let (norm_w, gate_w, up_w) = (norm_w.clone(), gate_w.clone(), up_w.clone());
        move |x: &Tensor| -> Result<[Tensor; 2]> {
            let normed = rows(&candle_nn::ops::rms_norm(x, &norm_w, eps as f32)?)?;
            let gate = project(&normed, &gate_w, gate_b.as_ref())?;
            Ok([gate, project(&normed, &up_w, up_b.as_ref())?])
        }
    };
    let both = wide(&detached)?;
    let hidden = swiglu::forward(&both[0], &both[1])?;
    let kept = keep.then_some(both);
    let value = (project(&hidden, &down_w, down_b.as_ref())?.reshape(x.shape())? + &detached)?;
    composed::of_one(x, value, move |x, dy| {
        let again;
        let [gate, up] = match &kept {
            Some(kept) => kept,
            None => {
                again = wide(x)?;
                &again
            }
        };
        let d_hidden = rows(dy)?.matmul(&down_w)?;
        let [d_gate, d_up] = swiglu::backward(gate, up, &d_hidden)?;
        let d_normed = (d_gate.matmul(&gate_w)? + d_up.matmul(&up_w)?)?.reshape(x.shape())?;
        norm::backward(x, &norm_w, eps, &d_normed, Some(dy))
    })
}
