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
    let rows = heads.transpose(1, 2)?.contiguous()?;
    candle_nn::rotary_emb::rope_thd(&rows, &cos, &sin)?.transpose(1, 2)
}
