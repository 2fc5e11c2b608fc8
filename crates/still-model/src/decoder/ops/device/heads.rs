use candle_core::{Result, Tensor};

use crate::decoder::Rotation;
use crate::decoder::ops::composed;

/// [`super::super::split_heads`], its sizes checked: a view of the rotated rows `[B, N, H, D]`.
pub(in super::super) fn split_heads(
    x: &Tensor,
    head_dim: usize,
    rotation: Option<&Rotation>,
) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let rows = x.reshape((batch, tokens, width / head_dim, head_dim))?;
    let rows = match rotation {
        None => rows,
        Some(rotation) => {
            let rotated = rotate(&rows.detach().transpose(1, 2)?, rotation, false)?;
            let rotation = rotation.clone();
            // The gradient of a rotation is its transpose, the rotation back.
            composed::of_one(&rows, rotated.transpose(1, 2)?, move |_, dy| {
                rotate(&dy.transpose(1, 2)?, &rotation, true)?.transpose(1, 2)
            })?
        }
    };
    rows.transpose(1, 2)
}

/// Heads `[B, H, N, D]`, rotated or rotated back: a view of rows `[B, N, H, D]`.
pub(in crate::decoder) fn rotate(
    heads: &Tensor,
    rotation: &Rotation,
    back: bool,
) -> Result<Tensor> {
    let (head_dim, rotated) = (heads.dim(3)?, rotation.rotary_dim());
    if rotated < head_dim {
        let part = rotate(&heads.narrow(3, 0, rotated)?, rotation, back)?;
        let rest = heads.narrow(3, rotated, head_dim - rotated)?;
        // By token, as the whole of it would lie.
        return Tensor::cat(&[part.transpose(1, 2)?, rest.transpose(1, 2)?], 3)?.transpose(1, 2);
    }
    #[cfg(feature = "cuda")]
    if heads.device().is_cuda() {
        return super::kernels::rotate(heads, rotation, back);
    }
    let (cos, sin) = rotation.tensors(heads.device(), heads.dtype())?;
    let sin = if back { sin.neg()? } else { sin };
    // `[N, D / 2]`, or `[B, N, D / 2]` of sequences at positions of their own; the same for all heads.
    let heads_at = cos.rank() - 2;
    let [cos, sin] = [cos, sin].map(|angles| angles.unsqueeze(heads_at));
    let (cos, sin) = (cos?, sin?);
    let half = head_dim / 2;
    let (x, y) = (heads.narrow(3, 0, half)?, heads.narrow(3, half, half)?);
    let rotated_x = (x.broadcast_mul(&cos)? - y.broadcast_mul(&sin)?)?;
    let rotated_y = (x.broadcast_mul(&sin)? + y.broadcast_mul(&cos)?)?;
    let rows = Tensor::cat(&[rotated_x, rotated_y], 3)?.transpose(1, 2)?.contiguous()?;
    rows.transpose(1, 2)
}
