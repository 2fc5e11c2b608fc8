//! Softmax attention over any rows of K and V, in tensor operations that every device has. In float32.
//!
//! Rows come in parts that have a softmax each, which the logarithms of their sums join. So the rows of a context are read where
//! they are while others come after them, and a mask is added to the logits of a block's own rows alone.

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

    /// `count` rows, from one on.
    fn narrow(&self, from: usize, count: usize) -> Result<Self> {
        let absent = self.absent.as_ref().map(|absent| absent.narrow(2, from, count));
        Ok(Self {
            k: self.k.narrow(2, from, count)?,
            v: self.v.narrow(2, from, count)?,
            absent: absent.transpose()?,
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
}

/// Softmax attention of `q` `[B, H, T, D]` over rows in groups, none of which is copied: the last `T` rows of the last group are the
/// queries' own. Logits are `q·k` times `scale`, `later` is of `T` tokens. As `q`.
pub(super) fn attend(q: &Tensor, groups: &[&Rows], scale: f64, later: &Tensor) -> Result<Tensor> {
    let (batch, heads, tokens, width) = q.dims4()?;
    let (last, whole) = groups.split_last().expect("queries have rows of their own");
    let outputs = blocks(tokens).map(|(start, length)| -> Result<Tensor> {
        let before = last.k.dim(2)? - tokens + start;
        let own: Vec<Rows> = pieces(before, length)
            .map(|(from, count)| last.narrow(from, count))
            .collect::<Result<_>>()?;
        let rows: Vec<&Rows> = whole.iter().copied().chain(&own).collect();
        let keys = rows.iter().map(|rows| (rows.k.clone(), rows.absent.clone())).collect();
        let softmax = Softmax::new(&q.narrow(2, start, length)?, keys, scale, later)?;
        let values: Vec<&Tensor> = rows.iter().map(|rows| &rows.v).collect();
        Ok(softmax.times(&values)?.reshape((batch, heads, length, width))?)
    });
    let output = Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 2)?;
    Ok(output.to_dtype(q.dtype())?)
}

/// Where rows are cut that `tokens` queries attend to, theirs being the last: nothing comes after a lone query.
fn pieces(before: usize, tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    let pieces = match tokens {
        1 => [(0, before + 1), (0, 0)],
        _ => [(0, before), (before, tokens)],
    };
    pieces.into_iter().filter(|&(_, count)| count > 0)
}

/// The softmax of a block of `T` queries over rows in parts.
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
    /// Of queries `[B, H, T, D]` over keys `[B, K, M, D]` that are all there, the last `T` of which are the queries' own tokens.
    pub fn causal(q: &Tensor, k: &Tensor, scale: f64, later: &Tensor) -> Result<Self> {
        let tokens = q.dim(2)?;
        let keys = pieces(k.dim(2)? - tokens, tokens)
            .map(|(from, count)| Ok((k.narrow(2, from, count)?, None)))
            .collect::<Result<_>>()?;
        Self::new(q, keys, scale, later)
    }

    /// Of queries `[B, H, T, D]` over keys `[B, K, rows, D]` in parts, the last of which is the queries' own tokens; with what of a part
    /// is absent, `[B, K, rows]`. [`later`] is of `T` tokens or more.
    fn new(
        q: &Tensor,
        keys: Vec<(Tensor, Option<Tensor>)>,
        scale: f64,
        later: &Tensor,
    ) -> Result<Self> {
        let tokens = q.dim(2)?;
        let q = grouped(q, keys[0].0.dim(1)?, scale)?;
        let later = later.narrow(0, 0, tokens)?.narrow(1, 0, tokens)?.flatten_all()?;
        let own = keys.len() - 1;
        let parts = keys.into_iter().enumerate().map(|(n, (k, absent))| {
            let later = (tokens > 1 && n == own).then_some(&later);
            Part::new(&q, &k, absent, later)
        });
        let parts: Vec<Part> = parts.collect::<Result<_>>()?;
        let mut log_sum = parts[0].log_sum.clone();
        for part in &parts[1..] {
            let most = log_sum.maximum(&part.log_sum)?;
            let sum = ((log_sum - &most)?.exp()? + (&part.log_sum - &most)?.exp()?)?;
            log_sum = (most + sum.log()?)?;
        }
        Ok(Self { parts, log_sum })
    }

    /// Sums of values `[B, K, rows, D]`, a tensor a part, by their weights: `[B, K, G·T, D]`.
    fn times(&self, values: &[&Tensor]) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (part, v) in self.parts.iter().zip(values) {
            let own = part.weights.matmul(&v.contiguous()?)?.broadcast_mul(&self.share(part)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + own)?,
                None => own,
            });
        }
        Ok(sum.expect("a softmax is over some rows"))
    }

    /// Sums of weights over queries and query heads: `[B, K, M]`. A product, since a device reduces any but the last dimension slowly.
    pub fn sum_of_queries(&self) -> Result<Tensor> {
        let sums = self.parts.iter().map(|part| -> Result<Tensor> {
            let share = self.share(part)?.transpose(2, 3)?.contiguous()?;
            Ok(share.matmul(&part.weights)?.squeeze(2)?)
        });
        Ok(Tensor::cat(&sums.collect::<Result<Vec<_>>>()?, D::Minus1)?)
    }

    /// The weights themselves: `[B, K, G·T, M]`.
    pub fn weights(&self) -> Result<Tensor> {
        let weights = self
            .parts
            .iter()
            .map(|part| -> Result<Tensor> { Ok(part.weights.broadcast_mul(&self.share(part)?)?) });
        Ok(Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, D::Minus1)?)
    }

    /// The largest weight of each of some rows `k` `[B, K, R, D]`, which the softmax was over, over queries and query heads: `[B, K, R]`.
    /// `q` and `scale` as there. The logarithm of a weight is a product of a key and a query that have a value more, so that the
    /// largest lies in the last dimension.
    pub fn largest_of_queries(&self, q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
        let (batch, kv_heads, rows, _) = k.dims4()?;
        let q = grouped(q, kv_heads, scale)?;
        let queries = q.dim(2)?;
        // Four values more, for rows that begin at 16 bytes.
        let zeros = |rows| Tensor::zeros((batch, kv_heads, rows, 3), DType::F32, k.device());
        let ones = Tensor::ones((batch, kv_heads, rows, 1), DType::F32, k.device())?;
        let q = Tensor::cat(&[&q, &self.log_sum.neg()?, &zeros(queries)?], D::Minus1)?;
        let k = Tensor::cat(&[&k.to_dtype(DType::F32)?, &ones, &zeros(rows)?], D::Minus1)?;
        // What is joined in the last dimension lies the other way round.
        let (q, k) = (q.contiguous()?, k.contiguous()?);
        Ok(largest_of_last(&k.matmul(&q.transpose(2, 3)?)?)?.exp()?)
    }

    /// What of the whole softmax a part is, `[B, K, G·T, 1]`.
    fn share(&self, part: &Part) -> Result<Tensor> {
        Ok((&part.log_sum - &self.log_sum)?.exp()?)
    }
}

impl Part {
    /// Of queries `[B, K, G·T, D]`, scaled, over keys `[B, K, R, D]`; `later` `[T · T]` where `R` is `T`.
    fn new(q: &Tensor, k: &Tensor, absent: Option<Tensor>, later: Option<&Tensor>) -> Result<Self> {
        let k = k.to_dtype(DType::F32)?.contiguous()?;
        let mut logits = q.matmul(&k.transpose(2, 3)?)?;
        if let Some(absent) = absent {
            logits = logits.broadcast_add(&absent.unsqueeze(2)?)?;
        }
        if let Some(later) = later {
            // In two dimensions, as largest_of_last.
            let flat = logits.reshape(((), later.elem_count()))?;
            logits = flat.broadcast_add(later)?.reshape(logits.shape())?;
        }
        let weights = softmax_last_dim(&logits)?;
        let log_sum = (largest_of_last(&logits)? - largest_of_last(&weights)?.log()?)?;
        Ok(Self { weights, log_sum: log_sum.unsqueeze(D::Minus1)? })
    }
}

/// The largest values of the last dimension, which is dropped. In two dimensions: each costs a GPU a division for every value.
fn largest_of_last(x: &Tensor) -> Result<Tensor> {
    let (rest, last) = x.dims().split_at(x.rank() - 1);
    Ok(x.reshape(((), last[0]))?.max(1)?.reshape(rest)?)
}

/// Queries `[B, H, T, D]` by KV head, scaled: `[B, K, G·T, D]`.
fn grouped(q: &Tensor, kv_heads: usize, scale: f64) -> Result<Tensor> {
    let (batch, heads, tokens, width) = q.dims4()?;
    let q = (q.to_dtype(DType::F32)? * scale)?.contiguous()?;
    Ok(q.reshape((batch, kv_heads, heads / kv_heads * tokens, width))?)
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
