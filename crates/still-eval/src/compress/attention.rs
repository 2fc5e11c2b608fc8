//! Softmax attention over any rows of K and V, in tensor operations that every device has. In float32.

use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::error::Result;

/// Queries whose weights are held at a time.
const BLOCK: usize = 256;

/// Rows of K and V that are attended to: one layer.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// `[B, K, M, D]`, float32.
    pub k: Tensor,
    /// `[B, K, M, D]`, float32.
    pub v: Tensor,
    /// `[B, K, M]`: 0 for a row that is there, −∞ for one that is not.
    pub absent: Tensor,
}

impl Rows {
    /// Rows that are all there.
    pub fn new(k: &Tensor, v: &Tensor) -> Result<Self> {
        let (batch, heads, rows, _) = k.dims4()?;
        let absent = Tensor::zeros((batch, heads, rows), DType::F32, k.device())?;
        Ok(Self { k: k.to_dtype(DType::F32)?, v: v.to_dtype(DType::F32)?, absent })
    }

    /// Those of `self` and then those of `other`.
    pub fn then(&self, other: &Self) -> Result<Self> {
        Ok(Self {
            k: Tensor::cat(&[&self.k, &other.k], 2)?,
            v: Tensor::cat(&[&self.v, &other.v], 2)?,
            absent: Tensor::cat(&[&self.absent, &other.absent], 2)?,
        })
    }

    /// Softmax attention of `q` `[B, H, T, D]`, whose own tokens are the last `T` rows; logits are `q·k` times `scale`, `later` is of
    /// `T` tokens. As `q`.
    pub fn attend(&self, q: &Tensor, scale: f64, later: &Tensor) -> Result<Tensor> {
        let (batch, heads, tokens, width) = q.dims4()?;
        let (kv_heads, rows) = (self.k.dim(1)?, self.k.dim(2)?);
        let blocks = (0..tokens).step_by(BLOCK).map(|start| -> Result<Tensor> {
            let length = BLOCK.min(tokens - start);
            let seen = rows - tokens + start + length;
            let own = q.narrow(2, start, length)?;
            let k = self.k.narrow(2, 0, seen)?;
            let absent = self.absent.narrow(2, 0, seen)?;
            let weights = weights(&own, &k, Some(&absent), scale, later)?;
            let weights = weights.reshape((batch, kv_heads, heads / kv_heads * length, seen))?;
            let output = weights.matmul(&self.v.narrow(2, 0, seen)?.contiguous()?)?;
            Ok(output.reshape((batch, heads, length, width))?)
        });
        let output = Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, 2)?;
        Ok(output.to_dtype(q.dtype())?)
    }
}

/// Softmax weights `[B, K, H / K, T, M]` of queries `[B, H, T, D]` over keys `[B, K, M, D]`, the last `T` of which are the
/// queries' own tokens. `absent` `[B, K, M]` is added to the logits, and what [`later`] made of at least `T` tokens.
pub(super) fn weights(
    q: &Tensor,
    k: &Tensor,
    absent: Option<&Tensor>,
    scale: f64,
    later: &Tensor,
) -> Result<Tensor> {
    let (batch, heads, tokens, width) = q.dims4()?;
    let (kv_heads, rows) = (k.dim(1)?, k.dim(2)?);
    let group = heads / kv_heads;
    let q = (q.to_dtype(DType::F32)? * scale)?;
    let q = q.contiguous()?.reshape((batch, kv_heads, group * tokens, width))?;
    let k = k.to_dtype(DType::F32)?.contiguous()?;
    let logits = q.matmul(&k.transpose(2, 3)?)?;
    let mut logits = logits.reshape((batch, kv_heads, group, tokens, rows))?;
    if let Some(absent) = absent {
        logits = logits.broadcast_add(&absent.unsqueeze(2)?.unsqueeze(2)?)?;
    }
    if tokens > 1 {
        logits = logits.broadcast_add(&mask(later, tokens, rows)?)?;
    }
    Ok(softmax_last_dim(&logits)?)
}

/// Sums of weights `[B, K, G, T, M]` over their queries: `[B, K, G, M]`. A product with ones, since a device reduces any but the last
/// dimension slowly.
pub(super) fn sum_of_queries(weights: &Tensor) -> Result<Tensor> {
    let (batch, kv_heads, group, tokens, rows) = weights.dims5()?;
    let flat = weights.reshape((batch * kv_heads * group, tokens, rows))?;
    let ones = Tensor::ones((batch * kv_heads * group, 1, tokens), DType::F32, weights.device())?;
    Ok(ones.matmul(&flat)?.reshape((batch, kv_heads, group, rows))?)
}

/// The largest of weights `[B, K, G, T, M]` over query heads and queries: `[B, K, M]`. By halves, for the same reason.
pub(super) fn largest_of_queries(weights: &Tensor) -> Result<Tensor> {
    let (batch, kv_heads, group, tokens, rows) = weights.dims5()?;
    let mut left = weights.reshape((batch, kv_heads, group * tokens, rows))?;
    loop {
        let queries = left.dim(2)?;
        if queries <= 1 {
            return Ok(left.squeeze(2)?);
        }
        // The middle one of an odd number is in both halves.
        let half = queries.div_ceil(2);
        left = left.narrow(2, 0, half)?.maximum(&left.narrow(2, queries - half, half)?)?;
    }
}

/// `[T, T]`: −∞ where a row comes after its query, for up to [`BLOCK`] of `tokens` queries and their own rows. It is made once for
/// all layers and blocks.
pub(super) fn later(tokens: usize, device: &Device) -> Result<Tensor> {
    let tokens = tokens.min(BLOCK);
    let mut mask = vec![0.0_f32; tokens * tokens];
    for (query, mask) in mask.chunks_exact_mut(tokens.max(1)).enumerate() {
        mask[query + 1..].fill(f32::NEG_INFINITY);
    }
    Ok(Tensor::from_vec(mask, (tokens, tokens), device)?)
}

/// The beginning of `later` for `tokens` queries over `rows` rows, the last `tokens` of which are their own: `[T, M]`.
fn mask(later: &Tensor, tokens: usize, rows: usize) -> Result<Tensor> {
    let own = later.narrow(0, 0, tokens)?.narrow(1, 0, tokens)?;
    if rows == tokens {
        return Ok(own.contiguous()?);
    }
    let before = Tensor::zeros((tokens, rows - tokens), DType::F32, later.device())?;
    Ok(Tensor::cat(&[&before, &own.contiguous()?], 1)?)
}

/// Runs of at most [`BLOCK`] queries of `tokens`.
pub(super) fn blocks(tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..tokens).step_by(BLOCK).map(move |start| (start, BLOCK.min(tokens - start)))
}
