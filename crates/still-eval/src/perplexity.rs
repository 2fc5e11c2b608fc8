//! Perplexity of token ids in windows.

use still_attention::RowDtype;
use still_model::Model;

use crate::error::{EvalError, Result};
use crate::run::{Answer, AskOptions, Sample, ask};
use crate::task::{Task, id_windows};

/// Negative log-likelihood of each predicted token, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct Nll {
    /// `[windows][window − 1]`: entry `i` is `−ln p(token i+1 | tokens 0 … i)`.
    pub per_token: Vec<Vec<f32>>,
}

impl Nll {
    /// Of windows that were asked: one each, of the tokens that it scores.
    pub fn of(samples: &[Sample]) -> Self {
        let window = |sample: &Sample| match &sample.answer {
            Answer::Window { nll, .. } => Some(nll.clone()),
            _ => None,
        };
        Self { per_token: samples.iter().filter_map(window).collect() }
    }

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
/// Exact rows are kept as `rows`. `progress` is told the tokens done since it was last called.
///
/// # Errors
/// If `tokens` is too short, a likelihood is not finite, or the model fails.
pub fn evaluate_windows(
    model: &Model,
    tokens: &[u32],
    window: usize,
    windows: usize,
    rows: RowDtype,
    progress: &(dyn Fn(usize) + Sync),
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
    let ids = tokens[..needed].chunks_exact(window).map(<[u32]>::to_vec);
    let told = |_: &Task, _: &Sample| {
        progress(window);
        Ok(())
    };
    let options = AskOptions { rows, batch_size: 1, ..AskOptions::default() };
    let asked = ask(model, &id_windows("perplexity", ids), Vec::new(), &options, &told)?;
    Ok(Nll::of(&asked.samples))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_counts_only_its_own_predictions() {
        let nll = Nll { per_token: vec![vec![1.0, 2.0, 9.0], vec![3.0, 4.0, 9.0]] };
        assert_eq!(nll.prefix(3).per_token, [[1.0, 2.0], [3.0, 4.0]]);
        assert!((nll.prefix(3).mean() - 2.5).abs() < 1e-12);
        assert_eq!(nll.prefix(99), nll);
    }
}
