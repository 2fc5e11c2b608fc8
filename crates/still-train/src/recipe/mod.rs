//! Recipes: everything that decides a run, in one TOML file.

mod attention;
mod calibration;
mod checkpoint;
mod data;
mod evaluation;
mod guard;
mod overrides;
mod stages;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use attention::AttentionRecipe;
pub use calibration::CalibrationRecipe;
pub use checkpoint::CheckpointRecipe;
pub(crate) use data::MAX_LENGTHS;
pub use data::{DataRecipe, LossOn};
pub use evaluation::EvaluationRecipe;
pub use guard::GuardRecipe;
pub use stages::{FinetuneRecipe, Objective, Recompute, TransferLoss, TransferRecipe};

use crate::error::{Result, TrainError};
use crate::schedule::Schedule;
use overrides::{apply_override, check_keys, over_defaults};

/// A complete recipe; every key has a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Seed of initialisation and of the data's order.
    pub seed: u64,
    /// The hybrid attention.
    pub attention: AttentionRecipe,
    /// Budgets found before training.
    pub calibration: CalibrationRecipe,
    /// How text becomes windows.
    pub data: DataRecipe,
    /// Stage 1: attention transfer.
    pub transfer: TransferRecipe,
    /// Stage 2: low-rank finetuning.
    pub finetune: FinetuneRecipe,
    /// What is measured between steps.
    pub evaluation: EvaluationRecipe,
    /// When a step is skipped and a run given up.
    pub guard: GuardRecipe,
    /// What is kept on disk.
    pub checkpoint: CheckpointRecipe,
}

impl Recipe {
    /// Parses TOML and then applies overrides of the form `section.key=value`.
    ///
    /// # Errors
    /// Where it does not parse; an unknown key, with the nearest valid one; a value that makes no sense.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        let mut table: Table =
            text.parse().map_err(|error: toml::de::Error| TrainError::Recipe {
                what: error.to_string().trim_end().to_owned(),
                hint: "recipes are TOML; see recipes/ for complete ones".into(),
            })?;
        for item in overrides {
            apply_override(&mut table, item)?;
        }
        check_keys(&table)?;
        let recipe: Self =
            Value::Table(over_defaults(table)?).try_into().map_err(|error: toml::de::Error| {
                TrainError::Recipe {
                    what: error.message().to_owned(),
                    hint: "see recipes/ for complete recipes with every key".into(),
                }
            })?;
        recipe.validate()?;
        Ok(recipe)
    }

    fn validate(&self) -> Result<()> {
        let positive = [
            ("data.min_length", self.data.min_length),
            ("calibration.at_length", self.calibration.at_length),
            ("calibration.tokens", self.calibration.tokens),
            ("calibration.window", self.calibration.window),
            ("transfer.batch", self.transfer.batch),
            ("finetune.batch", self.finetune.batch),
            ("finetune.lora.rank", self.finetune.lora.rank),
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.keep", self.checkpoint.keep),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(invalid(format!("{key} is 0"), "use 1 or more"));
        }
        self.data.validate()?;
        self.calibration.validate()?;
        self.transfer.validate()?;
        self.finetune.validate()?;
        self.evaluation.validate()?;
        self.guard.validate()?;
        for (key, optimizer) in [
            ("transfer.optimizer.schedule", &self.transfer.optimizer),
            ("finetune.optimizer.schedule", &self.finetune.optimizer),
        ] {
            let plateau = matches!(optimizer.schedule, Schedule::Plateau { .. });
            if plateau && !self.evaluation.measures_loss() {
                return Err(evaluation::needs_loss(key));
            }
        }
        Ok(())
    }
}

/// An error of the recipe.
fn invalid(what: String, hint: &str) -> TrainError {
    TrainError::Recipe { what, hint: hint.into() }
}
