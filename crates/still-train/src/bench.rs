//! Time of training steps, on random tokens.

use serde::Serialize;
use still_eval::{random_tokens, timing};
use still_model::{Model, Student};

use crate::data::Window;
use crate::error::Result;
use crate::finetune::FinetuneStage;
use crate::metrics::Stage;
use crate::recipe::Recipe;
use crate::run::TrainingStage;
use crate::transfer::TransferStage;

/// Timed steps of one stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepTiming {
    /// The stage.
    pub stage: Stage,
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Number of trained values.
    pub trained_values: usize,
    /// Timed steps, after one step of warm-up.
    pub steps: usize,
    /// Median time in ms, until the loss and the gradient's norm are on the host.
    pub step_p50_ms: f64,
    /// Time of the slowest step in ms.
    pub step_max_ms: f64,
    /// Tokens of a step over its median time.
    pub tokens_per_s: f64,
}

/// Times `steps` steps of a stage of `recipe`, after one step of warm-up. Each step takes the recipe's batch of sequences of
/// `context` random tokens. The stage trains an untrained student, which is dropped.
///
/// # Errors
/// A recipe that does not fit the model; a loss that is not a number.
pub fn time_steps(
    model: &Model,
    recipe: &Recipe,
    stage: Stage,
    context: usize,
    steps: usize,
) -> Result<StepTiming> {
    let still = recipe.attention.resolve(model.config())?;
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed)?;
    let (mut trains, batch): (Box<dyn TrainingStage>, usize) = match stage {
        Stage::Transfer => {
            let stage = TransferStage::new(model, &student, &recipe.transfer)?;
            (Box::new(stage), recipe.transfer.batch)
        }
        Stage::Finetune => {
            let stage = FinetuneStage::new(model, &student, &recipe.finetune, recipe.seed)?;
            (Box::new(stage), recipe.finetune.batch)
        }
    };
    let parameters = trains.updates().optimizer.parameters();
    let trained_values = parameters.iter().map(|(_, var)| var.elem_count()).sum();
    let vocab_size = model.config().vocab_size;
    let windows: Vec<Window> = (0..batch)
        .map(|sequence| Window::from(random_tokens(vocab_size, context, sequence as u64)))
        .collect();
    let times =
        timing::time(model.device(), steps, Some(1), || trains.train(&windows).map(|_| ()))?;
    Ok(StepTiming {
        stage,
        context,
        batch,
        trained_values,
        steps: times.repetitions(),
        step_p50_ms: times.median_ms,
        step_max_ms: times.quantile_ms(1.0),
        tokens_per_s: 1e3 * (batch * context) as f64 / times.median_ms,
    })
}

#[cfg(test)]
mod tests {
    use still_model::random::{random_model, tiny_config};

    use super::*;

    #[test]
    fn steps_of_both_stages_are_timed() {
        let model = random_model(tiny_config(), 1).unwrap();
        let mut recipe = Recipe::default();
        recipe.finetune.batch = 2;
        for (stage, batch) in [(Stage::Transfer, 1), (Stage::Finetune, 2)] {
            let timing = time_steps(&model, &recipe, stage, 70, 3).unwrap();
            assert_eq!((timing.stage, timing.steps, timing.batch), (stage, 3, batch));
            assert!(timing.trained_values > 0 && timing.step_p50_ms <= timing.step_max_ms);
            let tokens = timing.tokens_per_s * timing.step_p50_ms / 1e3;
            assert!((tokens - (batch * 70) as f64).abs() < 1e-6);
        }
    }

    #[test]
    fn random_ids_are_in_the_vocabulary_and_differ() {
        let ids = random_tokens(50, 2000, 0);
        assert!(ids.iter().all(|&id| id < 50));
        assert!((0..50).all(|id| ids.contains(&id)));
        assert_ne!(ids, random_tokens(50, 2000, 1));
    }
}
