//! Measurements of the student while a run goes on.

use std::time::Instant;

use candle_core::DType;
use serde::{Deserialize, Serialize};
use still_attention::RowDtype;
use still_eval::{
    LongContextOptions, PasskeyPrompts, evaluate_windows, long_context, repeated_text_nll,
};
use still_model::Model;

use crate::data::Window;
use crate::error::{Result, TrainError};
use crate::metrics::{Logged, Stage};
use crate::recipe::EvaluationRecipe;

/// One evaluation: what the recipe asked for, and nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The stage.
    pub stage: Stage,
    /// Steps of the stage done; 0 before its first.
    pub step: usize,
    /// Next-token loss on the held-out windows, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heldout_nll: Option<f64>,
    /// Share of pass keys found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passkey_recall: Option<f64>,
    /// Loss on the second copy of a random sequence, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeated_nll: Option<f64>,
    /// Whether the held-out loss is the run's lowest so far.
    pub best: bool,
    /// Wall-clock seconds that it took.
    pub seconds: f64,
}

impl Logged for Evaluation {
    fn at(&self) -> (Stage, usize) {
        (self.stage, self.step)
    }
}

/// What is measured, the same at every evaluation of a run.
#[derive(Debug)]
pub(crate) struct Evaluator<'a> {
    heldout: &'a [Window],
    prompts: Option<PasskeyPrompts>,
    repeated_text: usize,
    seed: u64,
}

impl<'a> Evaluator<'a> {
    /// `heldout`: windows that no step trains on, one sequence each; as many are read as the recipe says.
    ///
    /// # Errors
    /// Fewer held-out windows than the recipe asks for; pass keys in too few tokens.
    pub fn new(
        recipe: &EvaluationRecipe,
        heldout: &'a [Window],
        model: &Model,
        seed: u64,
    ) -> Result<Self> {
        let Some(heldout) = heldout.get(..recipe.windows) else {
            return Err(TrainError::Recipe {
                what: format!(
                    "evaluation.windows is {}, {} held-out windows are there",
                    recipe.windows,
                    heldout.len()
                ),
                hint: "hold out more text, or lower evaluation.windows (0: measure no loss)".into(),
            });
        };
        let (keys, length) = (recipe.passkey_keys, recipe.passkey_length);
        let prompts = (keys > 0)
            .then(|| PasskeyPrompts::new(&model.tokenizer, length, keys, seed))
            .transpose()?;
        Ok(Self { heldout, prompts, repeated_text: recipe.repeated_text, seed })
    }

    /// Measures a student. Whether it is the best, the caller knows.
    ///
    /// # Errors
    /// A likelihood that is not a number; an error of the model.
    pub fn evaluate(&self, model: &Model, stage: Stage, step: usize) -> Result<Evaluation> {
        let started = Instant::now();
        let heldout_nll =
            (!self.heldout.is_empty()).then(|| self.heldout_nll(model)).transpose()?;
        let passkey_recall =
            self.prompts.as_ref().map(|prompts| recall(model, prompts)).transpose()?;
        let repeated_nll = (self.repeated_text > 0)
            .then(|| repeated_text_nll(model, self.repeated_text, self.seed, rows(model)))
            .transpose()?;
        Ok(Evaluation {
            stage,
            step,
            heldout_nll,
            passkey_recall,
            repeated_nll,
            best: false,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Mean over every predicted token of all windows.
    fn heldout_nll(&self, model: &Model) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0);
        for window in self.heldout {
            let (ids, length) = (window.ids(), window.len());
            let nll = evaluate_windows(model, ids, length, 1, rows(model), &|_| {})?;
            sum += nll.mean() * nll.tokens() as f64;
            tokens += nll.tokens();
        }
        Ok(sum / tokens as f64)
    }
}

/// Exact rows as the model computes them: a device's caches have no others.
fn rows(model: &Model) -> RowDtype {
    match model.decoder.dtype() {
        DType::BF16 => RowDtype::Bf16,
        _ => RowDtype::F32,
    }
}

fn recall(model: &Model, prompts: &PasskeyPrompts) -> Result<f64> {
    let options = LongContextOptions { marks: Vec::new(), decode_steps: 0, rows: rows(model) };
    Ok(long_context(model, prompts, &options, &|_| {})?.recall())
}
