//! Heads that find earlier copies: their attention on a random sequence fed twice.

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use still_attention::StillConfig;
use still_compute::losses::softmax_terms;
use still_compute::matmul::{Mat, matmul};
use still_compute::tensor::borrow;
use still_model::Model;

use super::{CalibrateOptions, share};
use crate::error::{Result, TrainError};

/// Query tokens whose logits exist at a time.
const BLOCK: usize = 64;

/// Attention of the second copy's tokens to the matching token and its successor in the first, mean over tokens and
/// sequences, of the strongest query head of each selection head: `[layer with full attention][selection head]`.
///
/// `progress` is told the tokens passed.
///
/// # Errors
/// An error of the model.
pub(super) fn scores(
    teacher: &Model,
    config: &StillConfig,
    options: &CalibrateOptions,
    progress: &dyn Fn(usize),
) -> Result<Vec<Vec<f64>>> {
    let decoder = &teacher.decoder;
    let geometry = teacher.config().geometry();
    let selection_heads = geometry.selection_heads(config.selection_head);
    let vocab = teacher.config().vocab_size as u32;
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut scores = vec![vec![0.0; geometry.num_heads]; decoder.layers.len()];
    for _ in 0..options.copies {
        let copy: Vec<u32> = (0..options.copy_length).map(|_| rng.random_range(0..vocab)).collect();
        let ids = [teacher.tokenizer.encode("", true)?.as_slice(), &copy, &copy].concat();
        let rotation = decoder.rotation(0, ids.len())?;
        decoder.visit_layers(decoder.embed(&ids)?, &rotation, None, |n, layer, inputs| {
            if layer.sliding_window.is_none() {
                let (q, k) = (&inputs.q, &inputs.k);
                let found = matching_attention(q, k, layer.logit_scale, options.copy_length)?;
                for (score, found) in scores[n].iter_mut().zip(found) {
                    *score += found / options.copies as f64;
                }
            }
            let attention = layer.softmax_attention(inputs)?;
            progress(share(2 * options.copy_length, n, decoder.layers.len()));
            Ok::<_, TrainError>(attention)
        })?;
    }
    // What stays as it is has no budget to find.
    let scores = teacher.config().full_layers().map(|layer| &scores[layer]);
    let group = geometry.num_heads / selection_heads;
    let strongest = |heads: &[f64]| heads.iter().copied().fold(0.0, f64::max);
    Ok(scores.map(|heads| heads.chunks(group).map(strongest).collect()).collect())
}

/// By query head: mean over the last `copy` tokens of softmax attention to what stands `copy` and `copy − 1` tokens before.
fn matching_attention(
    q: &Tensor,
    k: &Tensor,
    logit_scale: Option<f64>,
    copy: usize,
) -> Result<Vec<f64>> {
    let (_, heads, tokens, d) = q.dims4()?;
    let kv_heads = k.dim(1)?;
    let scale = logit_scale.map_or(1.0 / (d as f32).sqrt(), |scale| scale as f32);
    let on_host = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let (q, k) = (&on_host(q)?, &on_host(k)?);
    Ok(borrow(q, |q: &[f32]| {
        borrow(k, |k: &[f32]| {
            (0..heads)
                .into_par_iter()
                .map(|head| {
                    let q = &q[head * tokens * d..(head + 1) * tokens * d];
                    let kv = head * kv_heads / heads;
                    let k = &k[kv * tokens * d..(kv + 1) * tokens * d];
                    let mut logits = vec![f32::NAN; BLOCK * tokens];
                    let mut total = 0.0;
                    for first in (tokens - copy..tokens).step_by(BLOCK) {
                        let rows = BLOCK.min(tokens - first);
                        let (q, k) = (Mat::rows(&q[first * d..], d), Mat::rows(k, d).t());
                        matmul((rows, tokens, d), &mut logits, tokens, false, q, k);
                        let rows = logits.chunks_exact_mut(tokens).take(rows);
                        for (t, logits) in (first..).zip(rows) {
                            let visible = &mut logits[..=t];
                            let sum = softmax_terms(visible, scale);
                            // The last token's successor in the first copy is the second copy's first token.
                            total += f64::from((visible[t - copy] + visible[t - copy + 1]) / sum);
                        }
                    }
                    total / copy as f64
                })
                .collect()
        })
    })??)
}
