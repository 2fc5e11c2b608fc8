//! Dense causal attention through the tensor library's ops, a block of queries at a time.

use candle_core::{D, DType, Tensor};

use crate::Result;

/// Query rows answered together: what bounds the logits that are held.
const BLOCK: usize = 512;

/// [`crate::dense_attention`] on CUDA, its shapes checked; logits and their softmax in f32.
pub(crate) fn dense_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, num_heads, tokens, head_dim) = q.dims4()?;
    let kv_heads = k.dim(1)?;
    let group = num_heads / kv_heads;
    let scale = (head_dim as f64).powf(-0.5);
    let (k, v) = (k.detach().contiguous()?, v.detach().contiguous()?);
    let mut blocks = Vec::with_capacity(tokens.div_ceil(BLOCK));
    for start in (0..tokens).step_by(BLOCK) {
        let length = BLOCK.min(tokens - start);
        let keys = k.narrow(2, 0, start + length)?;
        let values = v.narrow(2, 0, start + length)?.contiguous()?;
        // The group's query heads are rows of one product.
        let queries = q.detach().narrow(2, start, length)?.contiguous()?;
        let queries = queries.reshape((batch, kv_heads, group * length, head_dim))?;
        let logits = queries.matmul(&keys.t()?.contiguous()?)?.to_dtype(DType::F32)?;
        let logits = (logits * scale)?.reshape((batch, kv_heads, group, length, start + length))?;
        let logits = logits.broadcast_add(&mask(start, length, q)?)?;
        let powers = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        let shares = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?.to_dtype(q.dtype())?;
        let out =
            shares.reshape((batch, kv_heads, group * length, start + length))?.matmul(&values)?;
        blocks.push(out.reshape((batch, num_heads, length, head_dim))?);
    }
    Ok(Tensor::cat(&blocks, 2)?)
}

/// `[length, start + length]`: 0 for keys up to the query's own, −∞ after it.
fn mask(start: usize, length: usize, like: &Tensor) -> Result<Tensor> {
    let end = (start + length) as u32;
    let keys = Tensor::arange(0, end, like.device())?.reshape((1, end as usize))?;
    let queries = Tensor::arange(start as u32, end, like.device())?.reshape((length, 1))?;
    let later = keys.broadcast_gt(&queries)?;
    let never = Tensor::full(f32::NEG_INFINITY, later.shape(), like.device())?;
    Ok(later.where_cond(&never, &never.zeros_like()?)?)
}
