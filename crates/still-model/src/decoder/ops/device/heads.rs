use candle_core::{Result, Tensor};

use super::composed;
use crate::decoder::Rotation;

/// [`super::super::split_heads`], its sizes checked: a view of the rotated rows `[B, N, H, D]`.
pub(in super::super) fn split_heads(
    x: &Tensor,
    head_dim: usize,
    rotation: Option<&Rotation>,
) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let split = (batch, tokens, width / head_dim, head_dim);
    let heads = x.reshape(split)?;
    let heads = match rotation {
        None => heads,
        Some(rotation) => {
            let (cos, sin) = rotation.tensors(x.device(), x.dtype())?;
            let rotate = candle_nn::rotary_emb::rope_thd;
            let value = rotate(&heads.detach().contiguous()?, &cos, &sin)?;
            // A rotation is orthogonal: the gradient is turned back.
            composed::of_one(&heads, value, move |_, dy| rotate(dy, &cos, &sin.neg()?))?
        }
    };
    heads.transpose(1, 2)
}
