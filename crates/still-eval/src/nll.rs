//! Negative log-likelihood per token, in windows, without ever holding all logits.

use candle_core::{DType, Device, Storage, Tensor};
use rayon::prelude::*;
use still_attention::RowDtype;
use still_model::Model;

use crate::error::{EvalError, Result};

/// Rows whose logits are held at a time.
const LOGIT_ROWS: usize = 128;
/// Windows read side by side: one sequence alone has too few heads to keep every core busy.
const BATCH: usize = 4;
/// Tokens fed to the model at a time, over all windows of a batch.
const FEED: usize = 1024;

/// Negative log-likelihood of each predicted token, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct Nll {
    /// `[windows][window − 1]`: entry `i` is `−ln p(token i+1 | tokens 0 … i)`.
    pub per_token: Vec<Vec<f32>>,
}

impl Nll {
    /// Tokens predicted.
    pub fn tokens(&self) -> usize {
        self.per_token.iter().map(Vec::len).sum()
    }

    /// Mean over all predicted tokens, nats.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.per_token.iter().flatten().map(|&x| f64::from(x)).sum();
        sum / self.tokens() as f64
    }

    /// `exp(mean)`.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// The same windows cut to their first `positions` tokens.
    ///
    /// Attention is causal, so this equals evaluating separate windows of `positions` tokens.
    pub fn prefix(&self, positions: usize) -> Nll {
        let predicted = positions.saturating_sub(1);
        let cut = |window: &Vec<f32>| window[..predicted.min(window.len())].to_vec();
        Nll { per_token: self.per_token.iter().map(cut).collect() }
    }
}

/// Evaluates `windows` consecutive, non-overlapping windows of `window` tokens, each from an empty state.
///
/// `progress` is told the tokens done since it was last called. Exact rows are kept in f32.
///
/// # Errors
/// If `tokens` is too short, a likelihood is not finite, or the model fails.
pub fn evaluate_windows(
    model: &Model,
    tokens: &[u32],
    window: usize,
    windows: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Nll> {
    if window < 2 || windows == 0 {
        return Err(EvalError::Argument(format!(
            "perplexity needs windows of at least 2 tokens, got {windows} of {window}"
        )));
    }
    let needed = window * windows;
    if tokens.len() < needed {
        return Err(EvalError::TooShort { what: "perplexity", needed, got: tokens.len() });
    }
    let all: Vec<&[u32]> = tokens[..needed].chunks_exact(window).collect();
    let mut per_token = Vec::with_capacity(windows);
    for batch in all.chunks(BATCH) {
        per_token.extend(one_batch(model, batch, progress)?);
    }
    for (index, nll) in per_token.iter().enumerate() {
        if let Some(token) = nll.iter().position(|x| !x.is_finite()) {
            return Err(EvalError::NotFinite { what: "the likelihood", window: index, token });
        }
    }
    Ok(Nll { per_token })
}

/// Windows of equal length, read side by side.
fn one_batch(
    model: &Model,
    windows: &[&[u32]],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<f32>>> {
    let length = windows.first().map_or(0, |window| window.len());
    let mut cache = model.new_cache(windows.len(), RowDtype::F32)?;
    let mut nll = vec![Vec::with_capacity(length.saturating_sub(1)); windows.len()];
    let feed = (FEED / windows.len()).max(1);
    for start in (0..length).step_by(feed) {
        let end = (start + feed).min(length);
        let ids: Vec<u32> =
            windows.iter().flat_map(|window| &window[start..end]).copied().collect();
        let ids = Tensor::from_vec(ids, (windows.len(), end - start), &Device::Cpu)?;
        let hidden = model.forward(&ids, &mut cache, None)?;
        for (sequence, (window, nll)) in windows.iter().zip(&mut nll).enumerate() {
            // The last token of the window predicts nothing that is in it.
            let targets = &window[start + 1..(end + 1).min(length)];
            let rows = hidden.get(sequence)?.narrow(0, 0, targets.len())?;
            nll.extend(nll_of_hidden(model, &rows, targets)?);
        }
        progress(windows.len() * (end - start));
    }
    Ok(nll)
}

/// `−ln p(target)` of each row of final-normed hidden states `[T, E]`; logits exist for a few rows at a time.
///
/// # Errors
/// If there is not one target per row, or the model fails.
pub fn nll_of_hidden(model: &Model, hidden: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    let rows = hidden.dim(0)?;
    if rows != targets.len() {
        return Err(EvalError::Argument(format!("{rows} hidden rows, {} targets", targets.len())));
    }
    let mut nll = Vec::with_capacity(rows);
    for start in (0..rows).step_by(LOGIT_ROWS) {
        let count = LOGIT_ROWS.min(rows - start);
        let logits = model.logits(&hidden.narrow(0, start, count)?)?;
        let vocab = logits.dim(1)?;
        let targets = &targets[start..start + count];
        if let Some(id) = targets.iter().find(|&&id| id as usize >= vocab) {
            return Err(EvalError::Argument(format!(
                "token {id} is outside the vocabulary of {vocab}"
            )));
        }
        let logits = logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?;
        let (storage, layout) = logits.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            return Err(EvalError::Argument("logits could not be brought to the CPU".into()));
        };
        let first = layout.start_offset();
        let rows = &storage.as_slice::<f32>()?[first..first + count * vocab];
        let block: Vec<f32> = rows
            .par_chunks_exact(vocab)
            .zip(targets)
            .map_init(Vec::new, |scratch, (row, &target)| surprise(row, target as usize, scratch))
            .collect();
        nll.extend(block);
    }
    Ok(nll)
}

/// `ln Σ e^row − row[target]`; `scratch` is overwritten.
fn surprise(row: &[f32], target: usize, scratch: &mut Vec<f32>) -> f32 {
    scratch.clear();
    scratch.extend_from_slice(row);
    let max = still_attention::vector::max(scratch);
    still_attention::vector::exp_sub_sum(scratch, max).ln() - (row[target] - max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_the_log_softmax() {
        let logits = [1.0_f32, -2.0, 0.5, 3.0, 1000.0_f32.ln()];
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for target in 0..logits.len() {
            let expected = total.ln() - f64::from(logits[target]);
            let got = f64::from(surprise(&logits, target, &mut Vec::new()));
            assert!((got - expected).abs() < 1e-5, "{got} {expected}");
        }
    }

    #[test]
    fn a_prefix_counts_only_its_own_predictions() {
        let nll = Nll { per_token: vec![vec![1.0, 2.0, 9.0], vec![3.0, 4.0, 9.0]] };
        assert_eq!(nll.prefix(3).per_token, [[1.0, 2.0], [3.0, 4.0]]);
        assert!((nll.prefix(3).mean() - 2.5).abs() < 1e-12);
        assert_eq!(nll.prefix(99), nll);
    }
}
