//! What each budget costs: the loss that a head's error adds, to second order.
//!
//! With `g_t` the gradient of the text's negative log-likelihood with respect to a head's attention output at token `t`, and
//! `Δ_t` what a smaller budget changes of that output, `½ Σ_t (g_t·Δ_t)²` estimates the KL divergence from the teacher:
//! the Fisher information of its predictions, with the text's own tokens for samples and no terms across tokens. The
//! gradient of the KL itself vanishes at the teacher, so there is no first-order term.

use std::cell::Cell;

use candle_core::{D, DType, Device, Tensor, Var};
use rayon::prelude::*;
use still_attention::{HybridConfig, HybridWeights, hybrid_attention};
use still_compute::pull_back;
use still_compute::tensor::borrow;
use still_model::{DecoderLayer, Model, Rotation, Student, StudentLayer};

use super::key_ranges::KeyRanges;
use super::share;
use crate::error::{Result, TrainError};
use crate::loss::{Target, vocabulary_loss};

/// Estimated loss in nats a token, `[layer with full attention][selection head][candidate]`; 0 for a whole head.
///
/// `ranges` takes the keys in. `progress` is told the tokens passed: a layer of the backward pass has its share of its window's.
///
/// # Errors
/// An error of the model; a loss that is not a number.
pub(super) fn losses(
    teacher: &Model,
    student: &Student,
    candidates: &[usize],
    windows: &[&[u32]],
    ranges: &mut KeyRanges,
    progress: &dyn Fn(usize),
) -> Result<Vec<Vec<Vec<f64>>>> {
    let lm_head = teacher.decoder.lm_head.dense()?;
    let heads = |layer: &StudentLayer| layer.config.budgets.len();
    let mut losses: Vec<Vec<Vec<f64>>> = student
        .layers
        .iter()
        .map(|layer| vec![vec![0.0; candidates.len()]; heads(layer)])
        .collect();
    let mut predictions = 0;
    for window in windows {
        let told = Cell::new(0);
        let told_of = |tokens| {
            told.set(told.get() + tokens);
            progress(tokens);
        };
        if window.len() > 1 {
            predictions += window.len() - 1;
            let found = (&mut losses[..], &mut *ranges);
            add_losses(teacher, student, &lm_head, candidates, window, found, &told_of)?;
        }
        progress(window.len() - told.get());
    }
    let scale = 0.5 / predictions.max(1) as f64;
    for loss in losses.iter_mut().flatten().flatten() {
        *loss *= scale;
    }
    Ok(losses)
}

/// Adds a window's losses, of the sum over its predictions, and its keys' ranges. `progress` is told the tokens passed, a layer's share at a time.
fn add_losses(
    teacher: &Model,
    student: &Student,
    lm_head: &Tensor,
    candidates: &[usize],
    window: &[u32],
    (losses, ranges): (&mut [Vec<Vec<f64>>], &mut KeyRanges),
    progress: &dyn Fn(usize),
) -> Result<()> {
    let decoder = &teacher.decoder;
    let rotation = decoder.rotation(0, window.len())?;
    let mut x = decoder.embed(window)?;
    let mut inputs = Vec::with_capacity(decoder.layers.len());
    for (n, layer) in decoder.layers.iter().enumerate() {
        let input = Var::from_tensor(&x)?;
        let pass = Pass::new(layer, &rotation, student.layer(n), &input)?;
        if student.layer(n).is_some() {
            ranges.add(n, &pass.k)?;
        }
        x = pass.layer_output(layer, &input, &pass.attention)?.detach();
        inputs.push(input);
    }
    let last = Var::from_tensor(&x)?;
    let normed = decoder.final_norm(&last)?;
    let hidden = normed.detach().squeeze(0)?;
    // Of the sum over predictions, not their mean.
    let count = window.len() - 1;
    let target = Target::NextToken(window);
    let (loss, gradient) = vocabulary_loss(&hidden, lm_head, target, None, count as f64)?;
    let loss = loss.value()?;
    if !loss.is_finite() {
        return Err(TrainError::NotFinite {
            stage: "calibration",
            step: 0,
            what: "the loss of the text",
            value: loss,
        });
    }
    let Some(mut upstream) = pull_back(&normed, &gradient.unsqueeze(0)?)?.backward()?.remove(&last)
    else {
        return Ok(());
    };
    let layers = decoder.layers.len();
    let mut of_layers = student.layers.iter().zip(losses).rev().peekable();
    for ((n, layer), input) in decoder.layers.iter().enumerate().zip(inputs).rev() {
        let own = of_layers.next_if(|(student, _)| student.config.layer == n);
        let pass = Pass::new(layer, &rotation, own.as_ref().map(|(student, _)| *student), &input)?;
        let attention = Var::from_tensor(&pass.attention)?;
        let out = pass.layer_output(layer, &input, &attention)?;
        let mut grads = pull_back(&out, &upstream)?.backward()?;
        let Some(g) = grads.remove(&attention) else { continue };
        if let Some((student, losses)) = own {
            pass.add_losses(&g, &student.attention, &student.config, candidates, losses)?;
        }
        let through = pull_back(&pass.attention, &g)?.backward()?.remove(&input);
        upstream = match (grads.remove(&input), through) {
            (Some(a), Some(b)) => (a + b)?,
            (Some(a), None) | (None, Some(a)) => a,
            (None, None) => break,
        };
        progress(share(window.len(), layers - 1 - n, layers));
    }
    Ok(())
}

/// A layer's attention over one window, every head whole.
struct Pass {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// `[1, H, N, D]`, with its graph.
    attention: Tensor,
}

impl Pass {
    fn new(
        layer: &DecoderLayer,
        rotation: &Rotation,
        student: Option<&StudentLayer>,
        input: &Tensor,
    ) -> Result<Self> {
        let inputs = layer.attention_inputs(input, rotation, None)?;
        let Some(StudentLayer { attention: weights, config, .. }) = student else {
            let attention = layer.softmax_attention(&inputs)?;
            return Ok(Self { q: inputs.q, k: inputs.k, v: inputs.v, attention });
        };
        // A budget of every token is softmax attention, and has a gradient.
        let whole = with_budget(config, config.chunk);
        let (q, k, v) = (inputs.q, inputs.k, inputs.v);
        let attention = hybrid_attention(&q, &k, &v, weights, None, &whole, None)?.out;
        Ok(Self { q, k, v, attention })
    }

    fn layer_output(
        &self,
        layer: &DecoderLayer,
        input: &Tensor,
        attention: &Tensor,
    ) -> Result<Tensor> {
        Ok(layer.layer_output(input, attention, None)?)
    }

    /// Adds `Σ_t (g_t·Δ_t)²` of every head and candidate.
    fn add_losses(
        &self,
        g: &Tensor,
        weights: &HybridWeights,
        config: &HybridConfig,
        candidates: &[usize],
        losses: &mut [Vec<f64>],
    ) -> Result<()> {
        let (q, k, v) = (self.q.detach(), self.k.detach(), self.v.detach());
        for (candidate, &budget) in candidates.iter().enumerate() {
            if budget == config.chunk {
                continue;
            }
            let config = with_budget(config, budget);
            let out = hybrid_attention(&q, &k, &v, weights, None, &config, None)?.out;
            let tensors = [&out, &self.attention, g];
            let sums = match g.device() {
                Device::Cpu => sums_on_cpu(tensors, losses.len())?,
                _ => sums_on_device(tensors, losses.len())?,
            };
            for (losses, sum) in losses.iter_mut().zip(sums) {
                losses[candidate] += sum;
            }
        }
        Ok(())
    }
}

/// `Σ_t (Σ_h g_ht·(out − whole)_ht)²` of each group of query heads; `[out, whole, g]` are `[1, H, N, D]`.
fn sums_on_cpu([out, whole, g]: [&Tensor; 3], groups: usize) -> candle_core::Result<Vec<f64>> {
    let (_, num_heads, tokens, d) = g.dims4()?;
    let block = num_heads / groups * tokens * d;
    borrow(out, |out: &[f32]| {
        borrow(whole, |whole: &[f32]| {
            borrow(g, |g: &[f32]| {
                let parts = out.par_chunks(block).zip(whole.par_chunks(block));
                let parts = parts.zip(g.par_chunks(block));
                parts.map(|((out, whole), g)| squares(out, whole, g, tokens, d)).collect()
            })
        })
    })??
}

/// The same on any device, in f32.
fn sums_on_device(tensors: [&Tensor; 3], groups: usize) -> candle_core::Result<Vec<f64>> {
    let [out, whole, g] = tensors.map(|tensor| tensor.detach().to_dtype(DType::F32));
    let along = ((out? - whole?)? * g?)?.sum(D::Minus1)?;
    let along = along.reshape((groups, (), along.dim(2)?))?.sum(1)?;
    let sums = along.sqr()?.sum(1)?.to_vec1::<f32>()?;
    Ok(sums.into_iter().map(f64::from).collect())
}

/// `Σ_t (Σ_h g_ht·(out − whole)_ht)²` of a group of query heads, each `[tokens, D]`.
fn squares(out: &[f32], whole: &[f32], g: &[f32], tokens: usize, d: usize) -> f64 {
    let mut total = 0.0;
    for t in 0..tokens {
        let mut along = 0.0_f64;
        for start in (t * d..out.len()).step_by(tokens * d) {
            let rows = out[start..start + d].iter().zip(&whole[start..start + d]);
            let dot: f32 = rows.zip(&g[start..start + d]).map(|((o, w), g)| (o - w) * g).sum();
            along += f64::from(dot);
        }
        total += along * along;
    }
    total
}

fn with_budget(config: &HybridConfig, budget: usize) -> HybridConfig {
    let budgets = vec![budget; config.budgets.len()];
    HybridConfig { budgets, gate: false, cap: None, ..config.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_sums_are_the_cpus() {
        let random = |seed| {
            let score = |i| still_compute::random::uniform(seed, [0, 0, i]) as f32 - 0.5;
            let values: Vec<f32> = (0..6 * 50 * 8).map(score).collect();
            Tensor::from_vec(values, (1, 6, 50, 8), &Device::Cpu).unwrap()
        };
        let tensors = [random(1), random(2), random(3)];
        let got = sums_on_device(tensors.each_ref(), 2).unwrap();
        let expected = sums_on_cpu(tensors.each_ref(), 2).unwrap();
        assert_eq!(got.len(), 2);
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got / expected - 1.0).abs() < 1e-5, "{got} and {expected}");
        }
    }
}
