//! What the attention of a context's own tokens says of each of its rows. `[K][N]` a layer.

use candle_core::{D, Tensor};

use super::attention::{Softmax, blocks, later};
use crate::error::Result;

/// Tokens at the prompt's end that SnapKV observes (`window_size` of the authors' code).
pub(super) const OBSERVED: usize = 32;
/// Neighbors of which a row takes SnapKV's largest score (`kernel_size`, `maxpool`): as in the authors' runs on LongBench. The default
/// of their code, the mean of 5, keeps less of an answer of several tokens.
pub(super) const POOLED: usize = 7;

/// A score of every row, by KV head.
pub(super) type Scores = Vec<Vec<f32>>;

/// SnapKV: attention that the last `observed` of `N` queries pay to each row before them, summed over queries and averaged over
/// the query heads of a KV head; of [`POOLED`] neighbors the largest. `q` `[1, H, N, D]`, `k` `[1, K, N, D]`; `N − observed` scores a
/// head.
pub(super) fn snapkv(q: &Tensor, k: &Tensor, observed: usize, scale: f64) -> Result<Scores> {
    let tokens = q.dim(2)?;
    let before = tokens - observed;
    let later = later(observed, q.device())?;
    let softmax = Softmax::causal(&q.narrow(2, before, observed)?, k, scale, &later)?;
    let sums = by_query_head(&softmax, q, k)?.narrow(D::Minus1, 0, before)?;
    let sums = sums.squeeze(0)?.to_vec2::<f32>()?;
    Ok(sums.iter().map(|sums| pool(sums)).collect())
}

/// Weights summed over queries, the mean of a KV head's query heads: `[1, K, M]`.
fn by_query_head(softmax: &Softmax, q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let query_heads = q.dim(1)? / k.dim(1)?;
    Ok((softmax.sum_of_queries()? / query_heads as f64)?)
}

/// The largest of [`POOLED`] neighbors.
fn pool(values: &[f32]) -> Vec<f32> {
    let reach = POOLED / 2;
    let largest = |at: usize| {
        let end = (at + reach + 1).min(values.len());
        values[at.saturating_sub(reach)..end].iter().copied().fold(f32::MIN, f32::max)
    };
    (0..values.len()).map(largest).collect()
}

/// H2O: attention that a row gets from all of the context's tokens, itself among them, summed over them and averaged over the
/// query heads of a KV head. `q` `[1, H, N, D]`, `k` `[1, K, N, D]`; `N` scores a head.
pub(super) fn h2o(q: &Tensor, k: &Tensor, scale: f64) -> Result<Scores> {
    let tokens = q.dim(2)?;
    let later = later(tokens, q.device())?;
    let mut sums: Option<Tensor> = None;
    for (start, length) in blocks(tokens) {
        let seen = start + length;
        let (own, seen_k) = (q.narrow(2, start, length)?, k.narrow(2, 0, seen)?);
        let softmax = Softmax::causal(&own, &seen_k, scale, &later)?;
        let of_block =
            by_query_head(&softmax, q, k)?.pad_with_zeros(D::Minus1, 0, tokens - seen)?;
        sums = Some(match sums {
            Some(sums) => (sums + of_block)?,
            None => of_block,
        });
    }
    match sums {
        Some(sums) => Ok(sums.squeeze(0)?.to_vec2()?),
        None => Ok(vec![Vec::new(); k.dim(1)?]),
    }
}
