//! Dense causal attention through the tensor library's ops, a block of queries at a time.

use candle_core::{D, DType, Tensor};

use crate::Result;

/// Query rows of a sequence answered together, at most.
const BLOCK: usize = 512;

/// Logits held at a time, in f32 half a gigabyte a copy: fewer query rows are answered together where keys are many.
const LOGITS: usize = 1 << 27;

/// [`crate::dense_attention`] on CUDA, its shapes checked; logits and their softmax in f32.
pub(crate) fn dense_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    attend(q, &k.detach().contiguous()?, &v.detach().contiguous()?, &[0])
}

/// Attention from `q` `[B, H, T, D]` to keys and values `[B, K, P + T, D]`, of which query `t` of a sequence sees those up to
/// `start + t`. `starts` has one for each sequence, or one for all. Keys and values may be a narrowed view along tokens.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, starts: &[usize]) -> Result<Tensor> {
    let (batch, num_heads, tokens, head_dim) = q.dims4()?;
    let (kv_heads, all) = (k.dim(1)?, k.dim(2)?);
    let group = num_heads / kv_heads;
    let scale = (head_dim as f64).powf(-0.5);
    let longest = starts.iter().copied().max().unwrap_or(0);
    let block = (LOGITS / (batch * num_heads * all)).clamp(1, BLOCK);
    let mut blocks = Vec::with_capacity(tokens.div_ceil(block));
    for start in (0..tokens).step_by(block) {
        let length = block.min(tokens - start);
        let end = longest + start + length;
        let (keys, values) = (k.narrow(2, 0, end)?, v.narrow(2, 0, end)?);
        // The group's query heads are rows of one product.
        let queries = q.detach().narrow(2, start, length)?.contiguous()?;
        let queries = queries.reshape((batch, kv_heads, group * length, head_dim))?;
        let logits = queries.matmul(&keys.t()?)?.to_dtype(DType::F32)?;
        let logits = (logits * scale)?.reshape((batch, kv_heads, group, length, end))?;
        // A lone query sees every key, if all sequences are equally long.
        let logits = match starts {
            [_] if length == 1 => logits,
            _ => logits.broadcast_add(&mask(starts, start, length, end, q)?)?,
        };
        let powers = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        let shares = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?.to_dtype(q.dtype())?;
        let out = shares.reshape((batch, kv_heads, group * length, end))?.matmul(&values)?;
        blocks.push(out.reshape((batch, num_heads, length, head_dim))?);
    }
    Ok(Tensor::cat(&blocks, 2)?)
}

/// `[starts, 1, 1, length, keys]`: 0 for keys up to the query's own, −∞ after it. The queries are `first..` after each start.
fn mask(
    starts: &[usize],
    first: usize,
    length: usize,
    keys: usize,
    like: &Tensor,
) -> Result<Tensor> {
    let queries = starts.iter().flat_map(|start| start + first..start + first + length);
    let queries: Vec<u32> = queries.map(|position| position as u32).collect();
    let queries = Tensor::from_vec(queries, (starts.len(), 1, 1, length, 1), like.device())?;
    let keys = Tensor::arange(0, keys as u32, like.device())?.reshape((1, 1, 1, 1, keys))?;
    let later = keys.broadcast_gt(&queries)?;
    let never = Tensor::full(f32::NEG_INFINITY, later.shape(), like.device())?;
    Ok(later.where_cond(&never, &never.zeros_like()?)?)
}
