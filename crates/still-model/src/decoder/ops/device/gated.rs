use candle_core::{Result, Tensor};

use super::linear::{project, rows};
use super::{activation, composed};
use crate::config::Activation;
use crate::decoder::Linear;

/// [`super::super::gated`], its sizes checked.
pub(in super::super) fn gated(
    x: &Tensor,
    gate: &Linear,
    up: &Linear,
    kind: Activation,
) -> Result<Tensor> {
    let (gate_w, up_w) = (gate.weight.dense()?.clone(), up.weight.dense()?.clone());
    let detached = rows(&x.detach())?;
    let wide = [
        project(&detached, &gate_w, gate.bias.as_ref())?,
        project(&detached, &up_w, up.bias.as_ref())?,
    ];
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = gate_w.dim(0)?;
    }
    let value = activation::forward(kind, &wide[0], &wide[1])?.reshape(shape)?;
    let wide = x.track_op().then_some(wide);
    composed::of_one(x, value, move |x, dy| {
        let Some([gate, up]) = &wide else {
            candle_core::bail!("gated: no gradient was asked for")
        };
        let [d_gate, d_up] = activation::backward(kind, gate, up, &rows(dy)?)?;
        (d_gate.matmul(&gate_w)? + d_up.matmul(&up_w)?)?.reshape(x.shape())
    })
}
