//! Scores, selection and attention in float64, one number at a time: what tests compare with.

use candle_core::{DType, Tensor};

use super::scores::POOLED;
use super::select::{Kept, SINKS};

/// `[heads][rows][D]`
pub(super) type Heads = Vec<Vec<Vec<f64>>>;

/// Of a tensor `[1, heads, rows, D]`.
pub(super) fn heads(tensor: &Tensor) -> Heads {
    tensor.squeeze(0).unwrap().to_dtype(DType::F64).unwrap().to_vec3().unwrap()
}

/// Softmax weights of a query over those of `keys` that it sees; 0 for the others.
fn weights(q: &[f64], keys: &[&[f64]], sees: impl Fn(usize) -> bool, scale: f64) -> Vec<f64> {
    let logit = |key: &[f64]| scale * q.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
    let powers: Vec<f64> = keys
        .iter()
        .enumerate()
        .map(|(row, key)| if sees(row) { logit(key).exp() } else { 0.0 })
        .collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

fn rows(head: &[Vec<f64>]) -> Vec<&[f64]> {
    head.iter().map(Vec::as_slice).collect()
}

/// Query heads of a KV head.
fn group<'a>(q: &'a Heads, k: &Heads, head: usize) -> &'a [Vec<Vec<f64>>] {
    let size = q.len() / k.len();
    &q[head * size..(head + 1) * size]
}

pub(super) fn snapkv(q: &Heads, k: &Heads, observed: usize, scale: f64) -> Vec<Vec<f64>> {
    let tokens = k[0].len();
    let before = tokens - observed;
    let head = |head: usize| {
        let mut sums = vec![0.0; before];
        let queries = group(q, k, head);
        for query in queries {
            for t in before..tokens {
                let weights = weights(&query[t], &rows(&k[head]), |row| row <= t, scale);
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum += weight / queries.len() as f64;
                }
            }
        }
        let reach = POOLED as isize / 2;
        let near = |at: isize| usize::try_from(at).ok().and_then(|at| sums.get(at)).unwrap_or(&0.0);
        (0..before as isize)
            .map(|at| (at - reach..=at + reach).map(near).copied().fold(0.0, f64::max))
            .collect()
    };
    (0..k.len()).map(head).collect()
}

pub(super) fn h2o(q: &Heads, k: &Heads, scale: f64) -> Vec<Vec<f64>> {
    let tokens = k[0].len();
    let head = |head: usize| {
        let queries = group(q, k, head);
        let mut sums = vec![0.0; tokens];
        for query in queries {
            for t in 0..tokens {
                let weights = weights(&query[t], &rows(&k[head]), |row| row <= t, scale);
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum += weight / queries.len() as f64;
                }
            }
        }
        sums
    };
    (0..k.len()).map(head).collect()
}

pub(super) fn largest(
    q: &Heads,
    k: &Heads,
    own: &Heads,
    (from, to): (usize, usize),
    scale: f64,
) -> Vec<Vec<f64>> {
    let head = |head: usize| {
        let sinks = SINKS.min(from);
        let mut keys: Vec<&[f64]> = rows(&k[head][..sinks]);
        keys.extend(rows(&k[head][from..to]));
        let before = keys.len();
        keys.extend(rows(&own[head]));
        let mut largest = vec![0.0_f64; to - from];
        for query in group(q, k, head) {
            for (t, query) in query.iter().enumerate() {
                let weights = weights(query, &keys, |row| row <= before + t, scale);
                for (largest, weight) in largest.iter_mut().zip(&weights[sinks..]) {
                    *largest = largest.max(*weight);
                }
            }
        }
        largest
    };
    (0..k.len()).map(head).collect()
}

pub(super) fn induction(q: &Heads, k: &Heads, scale: f64) -> Vec<f64> {
    let copy = k[0].len() / 2;
    let head = |head: usize| {
        let queries = group(q, k, head);
        let mut sum = 0.0;
        for query in queries {
            for t in 0..copy {
                let at = copy + t;
                let weights = weights(&query[at], &rows(&k[head]), |row| row <= at, scale);
                sum += weights[t + 1];
            }
        }
        sum / (copy * queries.len()) as f64
    };
    (0..k.len()).map(head).collect()
}

/// Whether fewer than `count` scores come before that of `row`: larger ones, and equal ones of earlier rows.
pub(super) fn is_best(scores: &[f64], row: usize, count: usize) -> bool {
    let before = |&other: &usize| {
        scores[other] > scores[row] || (scores[other] == scores[row] && other < row)
    };
    (0..scores.len()).filter(before).count() < count
}

/// Attention of a whole sequence `[H][N][D]`, in which tokens from `context` on see of the rows before it only those kept by their
/// KV head in this layer.
pub(super) fn attend(
    q: &Heads,
    k: &Heads,
    v: &Heads,
    kept: &[Vec<usize>],
    context: usize,
    scale: f64,
) -> Heads {
    let size = q.len() / k.len();
    let head = |(head, query): (usize, &Vec<Vec<f64>>)| {
        let (keys, kept) = (rows(&k[head / size]), &kept[head / size]);
        let output = |t: usize| {
            let sees =
                |row: usize| row <= t && (t < context || row >= context || kept.contains(&row));
            let weights = weights(&query[t], &keys, sees, scale);
            let mut output = vec![0.0; query[t].len()];
            for (weight, value) in weights.iter().zip(&v[head / size]) {
                for (output, value) in output.iter_mut().zip(value) {
                    *output += weight * value;
                }
            }
            output
        };
        (0..query.len()).map(output).collect()
    };
    q.iter().enumerate().map(head).collect()
}

/// Rows that a rule for one head's scores keeps, written out.
pub(super) fn each_head(
    scores: &[Vec<Vec<f64>>],
    tokens: usize,
    keeps: impl Fn(&[f64], usize) -> bool,
) -> Kept {
    let head = |scores: &Vec<f64>| (0..tokens).filter(|&row| keeps(scores, row)).collect();
    scores.iter().map(|layer| layer.iter().map(head).collect()).collect()
}
