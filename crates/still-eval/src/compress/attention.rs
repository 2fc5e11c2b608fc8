//! Softmax attention over any rows of K and V, in tensor operations that every device has. In float32.
//!
//! The rows before a block of queries and the block's own rows have a softmax each, which the logarithms of their sums join: a mask
//! is added to a block's own logits alone. Added to all of them, or in the layout of five dimensions, it takes a GPU longer than
//! everything else together.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::error::Result;

/// Queries whose weights are held at a time.
const BLOCK: usize = 256;

/// What a row that is not there adds to its logit. Finite, so that rows none of which are there have a softmax, whose share is 0.
pub(super) const ABSENT: f32 = -1e30;

/// Rows of K and V that are attended to: one layer.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// `[B, K, M, D]`, float32.
    pub k: Tensor,
    /// `[B, K, M, D]`, float32.
    pub v: Tensor,
    /// `[B, K, M]`: 0 for a row that is there, [`ABSENT`] for one that is not; `None` if all are.
    pub absent: Option<Tensor>,
}

impl Rows {
    /// Rows that are all there.
    pub fn new(k: &Tensor, v: &Tensor) -> Result<Self> {
        Ok(Self { k: k.to_dtype(DType::F32)?, v: v.to_dtype(DType::F32)?, absent: None })
    }

    /// Those of `self` and then those of `other`.
    pub fn then(&self, other: &Self) -> Result<Self> {
        let absent = match (&self.absent, &other.absent) {
            (None, None) => None,
            _ => Some(Tensor::cat(&[self.absence()?, other.absence()?], 2)?),
        };
        Ok(Self {
            k: Tensor::cat(&[&self.k, &other.k], 2)?,
            v: Tensor::cat(&[&self.v, &other.v], 2)?,
            absent,
        })
    }

    /// `absent`, of zeros if all rows are there.
    pub fn absence(&self) -> Result<Tensor> {
        let (batch, heads, rows, _) = self.k.dims4()?;
        Ok(match &self.absent {
            Some(absent) => absent.clone(),
            None => Tensor::zeros((batch, heads, rows), DType::F32, self.k.device())?,
        })
    }

    /// Softmax attention of `q` `[B, H, T, D]`, whose own tokens are the last `T` rows; logits are `q·k` times `scale`, `later` is of
    /// `T` tokens. As `q`.
    pub fn attend(&self, q: &Tensor, scale: f64, later: &Tensor) -> Result<Tensor> {
        let (batch, heads, tokens, width) = q.dims4()?;
        let rows = self.k.dim(2)?;
        let outputs = blocks(tokens).map(|(start, length)| -> Result<Tensor> {
            let seen = rows - tokens + start + length;
            let absent =
                self.absent.as_ref().map(|absent| absent.narrow(2, 0, seen)).transpose()?;
            let (q, k) = (q.narrow(2, start, length)?, self.k.narrow(2, 0, seen)?);
            let softmax = Softmax::new(&q, &k, absent.as_ref(), scale, later)?;
            Ok(softmax.times(&self.v)?.reshape((batch, heads, length, width))?)
        });
        let output = Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 2)?;
        Ok(output.to_dtype(q.dtype())?)
    }
}

/// The softmax of a block of `T` queries over `M` rows, in one or two parts: what comes before the queries' own tokens, and these.
pub(super) struct Softmax {
    parts: Vec<Part>,
    /// The logarithm of the sum of all exponentials, `[B, K, G·T, 1]`.
    log_sum: Tensor,
}

/// A softmax over some of the rows.
struct Part {
    /// `[B, K, G·T, rows]`.
    weights: Tensor,
    /// Of the part, as [`Softmax::log_sum`].
    log_sum: Tensor,
}

impl Softmax {
    /// Of queries `[B, H, T, D]` over keys `[B, K, M, D]`, the last `T` of which are the queries' own tokens. `absent` `[B, K, M]` is
    /// added to the logits, and what [`later`] made of at least `T` tokens.
    pub fn new(
        q: &Tensor,
        k: &Tensor,
        absent: Option<&Tensor>,
        scale: f64,
        later: &Tensor,
    ) -> Result<Self> {
        let (tokens, rows) = (q.dim(2)?, k.dim(2)?);
        let grouped = grouped(&(q.to_dtype(DType::F32)? * scale)?, k.dim(1)?)?;
        let part = |from: usize, count: usize, later: Option<&Tensor>| -> Result<Part> {
            let absent = absent.map(|absent| absent.narrow(2, from, count)).transpose()?;
            Part::new(&grouped, &k.narrow(2, from, count)?, absent, later)
        };
        // Nothing comes after a lone token.
        if tokens == 1 {
            return Ok(Self::joined(vec![part(0, rows, None)?])?);
        }
        let before = rows - tokens;
        let mut parts = Vec::new();
        if before > 0 {
            parts.push(part(0, before, None)?);
        }
        let later = later.narrow(0, 0, tokens)?.narrow(1, 0, tokens)?.contiguous()?;
        parts.push(part(before, tokens, Some(&later))?);
        Ok(Self::joined(parts)?)
    }

    fn joined(parts: Vec<Part>) -> candle_core::Result<Self> {
        let mut log_sum = parts[0].log_sum.clone();
        for part in &parts[1..] {
            let most = log_sum.maximum(&part.log_sum)?;
            let sum = ((log_sum - &most)?.exp()? + (&part.log_sum - &most)?.exp()?)?;
            log_sum = (most + sum.log()?)?;
        }
        Ok(Self { parts, log_sum })
    }

    /// Sums of rows of `v` `[B, K, M, D]`, `M` or more of them, by their weights: `[B, K, G·T, D]`.
    pub fn times(&self, v: &Tensor) -> Result<Tensor> {
        self.summed(|part, share, from| {
            let v = v.narrow(2, from, part.weights.dim(D::Minus1)?)?.contiguous()?;
            Ok(part.weights.matmul(&v)?.broadcast_mul(share)?)
        })
    }

    /// Sums of weights over queries and query heads: `[B, K, M]`. A product, since a device reduces any but the last dimension slowly.
    pub fn sum_of_queries(&self) -> Result<Tensor> {
        let sums = self.each(|part, share, _| {
            let share = share.transpose(2, 3)?.contiguous()?;
            Ok(share.matmul(&part.weights)?.squeeze(2)?)
        })?;
        Ok(Tensor::cat(&sums, D::Minus1)?)
    }

    /// The weights themselves: `[B, K, G·T, M]`.
    pub fn weights(&self) -> Result<Tensor> {
        let weights = self.each(|part, share, _| Ok(part.weights.broadcast_mul(share)?))?;
        Ok(Tensor::cat(&weights, D::Minus1)?)
    }

    /// The largest weight of each of some rows `k` `[B, K, R, D]`, which the softmax was over, over queries and query heads: `[B, K, R]`.
    /// `q` and `scale` as there. The logarithm of a weight is a product of a key and a query that have a value more, so that the
    /// largest lies in the last dimension.
    pub fn largest_of_queries(&self, q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
        let q = grouped(&(q.to_dtype(DType::F32)? * scale)?, k.dim(1)?)?;
        let q = Tensor::cat(&[&q, &self.log_sum.neg()?], D::Minus1)?;
        // Four values more, for rows that begin at 16 bytes.
        let one = self.log_sum.narrow(2, 0, 1)?.ones_like()?;
        let one = one.broadcast_as((k.dim(0)?, k.dim(1)?, k.dim(2)?, 1))?;
        let k = Tensor::cat(&[&k.to_dtype(DType::F32)?, &one.contiguous()?], D::Minus1)?;
        let q = q.pad_with_zeros(D::Minus1, 0, 3)?;
        let k = k.pad_with_zeros(D::Minus1, 0, 3)?;
        Ok(k.matmul(&q.transpose(2, 3)?)?.max(D::Minus1)?.exp()?)
    }

    fn each(&self, of: impl Fn(&Part, &Tensor, usize) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let mut from = 0;
        let parts = self.parts.iter().map(|part| {
            let share = (&part.log_sum - &self.log_sum)?.exp()?;
            let result = of(part, &share, from);
            from += part.weights.dim(D::Minus1)?;
            result
        });
        parts.collect()
    }

    fn summed(&self, of: impl Fn(&Part, &Tensor, usize) -> Result<Tensor>) -> Result<Tensor> {
        let mut parts = self.each(of)?.into_iter();
        let first = parts.next().expect("a softmax is over some rows");
        Ok(parts.try_fold(first, |sum, part| sum + part)?)
    }
}

impl Part {
    /// Of queries `[B, K, G·T, D]`, scaled, over keys `[B, K, R, D]`; `later` `[T, T]` where `R` is `T`.
    fn new(q: &Tensor, k: &Tensor, absent: Option<Tensor>, later: Option<&Tensor>) -> Result<Self> {
        let k = k.to_dtype(DType::F32)?.contiguous()?;
        let mut logits = q.matmul(&k.transpose(2, 3)?)?;
        if let Some(absent) = absent {
            logits = logits.broadcast_add(&absent.unsqueeze(2)?)?;
        }
        if let Some(later) = later {
            // Two dimensions: each costs a GPU a division for every value.
            let flat = logits.reshape(((), later.elem_count()))?;
            logits = flat.broadcast_add(&later.flatten_all()?)?.reshape(logits.shape())?;
        }
        let weights = softmax_last_dim(&logits)?;
        let largest = weights.max_keepdim(D::Minus1)?;
        let log_sum = (logits.max_keepdim(D::Minus1)? - largest.log()?)?;
        Ok(Self { weights, log_sum })
    }
}

/// Queries `[B, H, T, D]` by KV head: `[B, K, G·T, D]`.
fn grouped(q: &Tensor, kv_heads: usize) -> Result<Tensor> {
    let (batch, heads, tokens, width) = q.dims4()?;
    Ok(q.contiguous()?.reshape((batch, kv_heads, heads / kv_heads * tokens, width))?)
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

/// Runs of at most [`BLOCK`] queries of `tokens`.
pub(super) fn blocks(tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..tokens).step_by(BLOCK).map(move |start| (start, BLOCK.min(tokens - start)))
}
