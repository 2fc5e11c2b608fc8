//! Recipes: all settings of a run, in one TOML file.

mod attention;
mod built_in;
mod calibration;
mod checkpoint;
mod data;
mod evaluation;
mod guard;
mod overrides;
mod ranges;
mod stages;

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use still_model::{LoraTarget, ModelConfig};
use toml::{Table, Value};

pub use attention::AttentionRecipe;
pub use built_in::BuiltIn;
pub use calibration::CalibrationRecipe;
pub use checkpoint::CheckpointRecipe;
pub(crate) use data::MAX_LENGTHS;
pub use data::{DataRecipe, LossOn};
pub use evaluation::EvaluationRecipe;
pub use guard::GuardRecipe;
pub use stages::{FinetuneRecipe, Objective, Recompute, Reduction, TransferLoss, TransferRecipe};

use crate::calibrate::CalibrateOptions;
use crate::error::{Result, TrainError};
use crate::schedule::Schedule;
use overrides::{apply_override, check_keys, over_defaults, sets};
use ranges::{as_table, check_ranges};

/// Longest file of a recipe.
const MAX_BYTES: u64 = 16 << 20;
/// Most names in a dotted key.
const MAX_NAMES: usize = 64;

/// A complete recipe; every key has a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Seed of initialization and of the data's order.
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
    /// Reads a recipe's file or a built-in recipe ([`BuiltIn`]), or takes the defaults; then applies overrides
    /// ([`Recipe::parse`]). A file has precedence over a built-in recipe of the same name.
    ///
    /// # Errors
    /// A file that cannot be read or is no recipe; errors of [`Recipe::parse`], with the file's name.
    pub fn read(path: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let Some(path) = path else { return Self::parse("", overrides) };
        if !path.exists() {
            return match BuiltIn::named(path) {
                Some(recipe) => Self::resolve(recipe.text, None, overrides),
                None => {
                    let names = BuiltIn::ALL.map(|recipe| recipe.name).join(", ");
                    let what = format!("no file {}, and no recipe of this name", path.display());
                    Err(invalid(what, &format!("name a TOML file, or one of {names}")))
                }
            };
        }
        let mut text = String::new();
        let file = still_model::files::open(path).map_err(TrainError::read(path))?;
        let read = file.take(MAX_BYTES + 1).read_to_string(&mut text);
        read.map_err(TrainError::read(path))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(invalid(
                format!("{} is longer than 16 MiB", path.display()),
                "give a recipe: a TOML file of a few kilobytes, as in recipes/",
            ));
        }
        Self::resolve(&text, Some(path), overrides)
    }

    /// Parses TOML and then applies overrides of the form `section.key=value`.
    ///
    /// # Errors
    /// A place that does not parse; an unknown key, with the nearest valid one; a value out of its range (docs/recipes.md).
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        Self::resolve(text, None, overrides)
    }

    fn resolve(text: &str, path: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let file = path.map(|path| path.display().to_string());
        // Tables in tables, each a level of recursion for whoever goes through them.
        let names = |part: &str| part.matches('.').count() > MAX_NAMES;
        let long = |line: &str| {
            line.split('#')
                .next()
                .is_some_and(|code| code.split([',', '=', '[', ']', '{', '}']).any(names))
        };
        if let Some(line) = text.lines().position(long) {
            let file = file.iter().map(|file| format!("{file}, ")).collect::<String>();
            let what = format!("{file}line {}: a key of more than {MAX_NAMES} names", line + 1);
            return Err(invalid(what, "keys have a few: section.key"));
        }
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
            // With the line that it is about, unless that is long.
            let mut what = error.to_string().trim_end().to_owned();
            if what.len() > 1000 {
                let before = error.span().and_then(|span| text.get(..span.start));
                let line = before.map_or(1, |before| 1 + before.matches('\n').count());
                what = format!("line {line}: {}", error.message());
            }
            TrainError::Recipe {
                what: file.iter().map(|file| format!("{file}: ")).collect::<String>() + &what,
                hint: "recipes are TOML; see recipes/ for complete ones".into(),
            }
        })?;
        for item in overrides {
            apply_override(&mut table, item)?;
        }
        check_keys(&table)?;
        let table = over_defaults(table)?;
        check_ranges(&table, |key| match (overrides.iter().any(|item| sets(item, key)), &file) {
            (true, _) => " (--set)".into(),
            (false, Some(file)) => format!(" ({file})"),
            (false, None) => String::new(),
        })?;
        let recipe: Self = Value::Table(table).try_into().map_err(|error: toml::de::Error| {
            let key = error.to_string();
            let key = key.lines().find_map(|line| line.trim().strip_prefix("in `"));
            let key =
                key.map_or_else(String::new, |key| format!("{}: ", key.trim_end_matches('`')));
            TrainError::Recipe {
                what: format!("{key}{}", error.message()),
                hint: "see recipes/ for complete recipes with every key".into(),
            }
        })?;
        recipe.check_together()?;
        Ok(recipe)
    }

    /// Checks every value, as [`Recipe::parse`] does, for a recipe that was built in code.
    ///
    /// # Errors
    /// A value out of its range; values that contradict each other.
    pub fn validate(&self) -> Result<()> {
        check_ranges(&as_table(self)?, |_| String::new())?;
        self.check_together()
    }

    /// The recipe of a student without training: no steps and no evaluations. Budgets are calibrated to the default share if the
    /// recipe has neither budgets nor a share.
    ///
    /// # Errors
    /// As [`Recipe::validate`].
    pub(crate) fn training_free(&self, model: &ModelConfig) -> Result<Self> {
        let mut recipe = self.clone();
        (recipe.transfer.steps, recipe.finetune.steps) = (0, 0);
        recipe.evaluation.every = 0;
        if recipe.attention.budgets.is_none() {
            let calibration = &mut recipe.calibration;
            let usual = CalibrateOptions::usual_cache_fraction(model, calibration.at_length);
            calibration.cache_fraction.get_or_insert(usual);
        }
        recipe.validate()?;
        Ok(recipe)
    }

    /// Checks values that depend on each other.
    fn check_together(&self) -> Result<()> {
        self.data.validate()?;
        self.evaluation.validate()?;
        if self.finetune.lora.targets.contains(&LoraTarget::G) && !self.attention.gate {
            return Err(invalid(
                "finetune.lora.targets has the output gate (\"g\"), which attention.gate leaves out".into(),
                "set attention.gate to true, or leave \"g\" out",
            ));
        }
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
