//! The range of every number in a recipe. docs/recipes.md has the same table; a test holds them together.

use std::fmt;

use toml::{Table, Value};

use super::invalid;
use crate::error::{Result, TrainError};

/// Most tokens of a window or prompt.
const TOKENS: i64 = 1 << 24;
/// Most steps of a stage, or between two of anything.
const STEPS: i64 = 10_000_000;
/// Beyond any count of windows, keys or files that a run could go through.
const COUNT: i64 = 1_000_000;

/// Most tokens of a chunk: a state has room for two chunks of exact rows, whatever it reads.
const CHUNK: i64 = 65_536;
/// Most columns of a feature map's matrix: a state has two rows for each.
const FEATURES: i64 = 4096;

/// What a number may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Range {
    /// A whole number, both ends included.
    Whole(i64, i64),
    /// A number, both ends included.
    Real(f64, f64),
    /// A number above the first, at most the second.
    Above(f64, f64),
    /// A number from the first up to, but not, the second.
    Below(f64, f64),
    /// A number between the two, neither of them.
    Between(f64, f64),
    /// 0, or a number above the first and at most the second.
    ZeroOrAbove(f64, f64),
}

use Range::{Above, Below, Between, Real, Whole, ZeroOrAbove};

/// By key, in the order of docs/recipes.md. Of a list each number is meant.
pub(super) const RANGES: &[(&str, Range)] = &[
    ("seed", Whole(0, i64::MAX)),
    ("attention.chunk", Whole(1, CHUNK)),
    ("attention.budget", Whole(0, CHUNK)),
    ("attention.budgets", Whole(0, CHUNK)),
    ("attention.cap", Whole(0, TOKENS)),
    ("attention.feature_dim", Whole(1, FEATURES)),
    ("attention.router.random.seed", Whole(0, i64::MAX)),
    ("calibration.cache_fraction", Above(0.0, 1.0)),
    ("calibration.at_length", Whole(1, TOKENS)),
    ("calibration.tokens", Whole(1, 1 << 40)),
    ("calibration.window", Whole(2, TOKENS)),
    ("data.length", Whole(2, TOKENS)),
    ("data.lengths", Whole(2, TOKENS)),
    ("data.length_weights", Above(0.0, 1e12)),
    ("data.length_steps", Whole(0, STEPS)),
    ("data.min_length", Whole(2, TOKENS)),
    ("data.max_line_bytes", Whole(1024, 1 << 34)),
    ("data.max_word_bytes", Whole(1 << 20, 1 << 30)),
    ("data.weights", Above(0.0, 1e12)),
    ("data.heldout", Below(0.0, 1.0)),
    ("data.heldout_windows", Whole(0, COUNT)),
    ("transfer.steps", Whole(0, STEPS)),
    ("transfer.batch", Whole(1, 65_536)),
    ("transfer.loss_scale", Above(0.0, 1e9)),
    ("transfer.linear_branch_weight", Real(0.0, 1e6)),
    ("transfer.optimizer.lr", Above(0.0, 1e3)),
    ("transfer.optimizer.warmup", Whole(0, STEPS)),
    ("transfer.optimizer.schedule.plateau.factor", Between(0.0, 1.0)),
    ("transfer.optimizer.schedule.plateau.patience", Whole(0, COUNT)),
    ("transfer.optimizer.schedule.plateau.threshold", Below(0.0, 1.0)),
    ("transfer.optimizer.schedule.plateau.cooldown", Whole(0, COUNT)),
    ("transfer.optimizer.floor", Real(0.0, 1.0)),
    ("transfer.optimizer.beta1", Below(0.0, 1.0)),
    ("transfer.optimizer.beta2", Below(0.0, 1.0)),
    ("transfer.optimizer.eps", Real(0.0, 1e3)),
    ("transfer.optimizer.weight_decay", Real(0.0, 1e3)),
    ("transfer.optimizer.clip", Real(0.0, 1e30)),
    ("finetune.steps", Whole(0, STEPS)),
    ("finetune.batch", Whole(1, 65_536)),
    ("finetune.objective.mixed.kl", Real(0.0, 1.0)),
    ("finetune.dropout", Below(0.0, 1.0)),
    ("finetune.lora.rank", Whole(1, 65_536)),
    ("finetune.lora.alpha", Above(0.0, 1e6)),
    ("finetune.optimizer.lr", Above(0.0, 1e3)),
    ("finetune.optimizer.warmup", Whole(0, STEPS)),
    ("finetune.optimizer.schedule.plateau.factor", Between(0.0, 1.0)),
    ("finetune.optimizer.schedule.plateau.patience", Whole(0, COUNT)),
    ("finetune.optimizer.schedule.plateau.threshold", Below(0.0, 1.0)),
    ("finetune.optimizer.schedule.plateau.cooldown", Whole(0, COUNT)),
    ("finetune.optimizer.floor", Real(0.0, 1.0)),
    ("finetune.optimizer.beta1", Below(0.0, 1.0)),
    ("finetune.optimizer.beta2", Below(0.0, 1.0)),
    ("finetune.optimizer.eps", Real(0.0, 1e3)),
    ("finetune.optimizer.weight_decay", Real(0.0, 1e3)),
    ("finetune.optimizer.clip", Real(0.0, 1e30)),
    ("evaluation.every", Whole(0, STEPS)),
    ("evaluation.windows", Whole(0, COUNT)),
    ("evaluation.passkey_keys", Whole(0, COUNT)),
    ("evaluation.passkey_length", Whole(1, TOKENS)),
    ("evaluation.repeated_text", Whole(0, TOKENS)),
    ("evaluation.early_stop", Whole(0, COUNT)),
    ("guard.spike_factor", ZeroOrAbove(1.0, 1e30)),
    ("guard.spike_window", Whole(crate::spikes::FEWEST as i64, COUNT)),
    ("guard.max_skips", Whole(0, STEPS)),
    ("guard.max_heldout_growth", ZeroOrAbove(1.0, 1e30)),
    ("checkpoint.every", Whole(1, STEPS)),
    ("checkpoint.keep", Whole(1, COUNT)),
];

impl Range {
    fn has(self, value: &Value) -> bool {
        let number = match *value {
            Value::Integer(number) => number as f64,
            Value::Float(number) => number,
            _ => return false,
        };
        // Of a NaN every comparison is false.
        match (self, value) {
            (Whole(low, high), Value::Integer(number)) => (low..=high).contains(number),
            (Whole(..), _) => false,
            (Real(low, high), _) => low <= number && number <= high,
            (Above(low, high), _) => low < number && number <= high,
            (Below(low, high), _) => low <= number && number < high,
            (Between(low, high), _) => low < number && number < high,
            (ZeroOrAbove(low, high), _) => number == 0.0 || (low < number && number <= high),
        }
    }
}

/// As an imperative takes it: "use …".
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Whole(low, i64::MAX) => write!(f, "a whole number from {low} to 2⁶³ − 1"),
            Whole(low, high) => write!(f, "a whole number from {low} to {high}"),
            Real(low, high) => write!(f, "a number from {} to {}", Short(low), Short(high)),
            Above(low, high) => {
                write!(f, "a number above {} and at most {}", Short(low), Short(high))
            }
            Below(low, high) => {
                write!(f, "a number from {} up to, but not, {}", Short(low), Short(high))
            }
            Between(low, high) => {
                write!(f, "a number between {} and {}, neither of them", Short(low), Short(high))
            }
            ZeroOrAbove(low, high) => {
                write!(f, "0, or a number above {} and at most {}", Short(low), Short(high))
            }
        }
    }
}

/// A number in few characters.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.abs() < 1e4 { write!(f, "{}", self.0) } else { write!(f, "{:e}", self.0) }
    }
}

/// Checks every number of a complete recipe; `origin` tells where a key's value came from.
pub(super) fn check_ranges(recipe: &Table, origin: impl Fn(&str) -> String) -> Result<()> {
    for (key, range) in RANGES {
        let Some(value) = value_of(recipe, key) else { continue };
        if let Some(wrong) = outside(value, *range) {
            let verb = if value.is_array() { "has" } else { "is" };
            return Err(TrainError::Recipe {
                what: format!("{key} {verb} {}{}", shown(wrong), origin(key)),
                hint: format!("use {range}"),
            });
        }
    }
    Ok(())
}

fn value_of<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut keys = key.split('.');
    let mut value = table.get(keys.next()?)?;
    for key in keys {
        value = value.get(key)?;
    }
    Some(value)
}

/// The value, or the first of a list's, that is not in the range.
fn outside(value: &Value, range: Range) -> Option<&Value> {
    match value {
        Value::Array(values) => values.iter().find_map(|value| outside(value, range)),
        value => (!range.has(value)).then_some(value),
    }
}

/// A value on one short line.
fn shown(value: &Value) -> String {
    let text = match value {
        // As it was most likely written: 0.5 as 0.5, 1e12 as 1e12.
        Value::Float(number) if number.is_finite() => Short(*number).to_string(),
        value => value.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    };
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A recipe, or a section of one, as a table.
pub(super) fn as_table(recipe: &impl serde::Serialize) -> Result<Table> {
    Table::try_from(recipe)
        .map_err(|error| invalid(error.to_string(), "use whole numbers below 2⁶³"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Recipe;

    /// Dotted paths of all numbers, and of lists.
    fn numbers(prefix: &str, table: &Table, to: &mut Vec<String>) {
        for (key, value) in table {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                Value::Table(table) => numbers(&path, table, to),
                Value::Integer(_) | Value::Float(_) => to.push(path),
                Value::Array(values) if !values.iter().any(Value::is_str) => to.push(path),
                _ => {}
            }
        }
    }

    #[test]
    fn every_number_of_a_recipe_has_a_range_that_its_default_is_in() {
        let table = as_table(&Recipe::default()).unwrap();
        let mut found = Vec::new();
        numbers("", &table, &mut found);
        // Lists of names.
        found.retain(|key| key != "data.heldout_files");
        for key in found {
            assert!(RANGES.iter().any(|(known, _)| *known == key), "{key} has no range");
        }
        check_ranges(&table, |_| String::new()).unwrap();
    }

    #[test]
    fn the_documentation_tells_every_range() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipes.md");
        let text = std::fs::read_to_string(path).unwrap();
        for (key, range) in RANGES {
            let row = format!("| `{key}` | {range} |");
            assert!(text.contains(&row), "docs/recipes.md lacks the row\n{row}");
        }
    }

    #[test]
    fn what_is_no_number_is_outside_every_range() {
        for (_, range) in RANGES {
            let wrong = [
                Value::Float(f64::NAN),
                Value::Float(f64::INFINITY),
                Value::Float(f64::NEG_INFINITY),
                Value::Integer(i64::MIN),
                Value::Float(-1e-3),
                Value::String("7".into()),
                Value::Boolean(true),
                Value::Table(Table::new()),
            ];
            assert!(wrong.iter().all(|value| outside(value, *range).is_some()), "{range:?}");
        }
        assert!(outside(&Value::Float(3.0), Whole(1, 9)).is_some(), "3.0 is not whole as written");
        assert!(outside(&Value::Integer(3), Real(1.0, 9.0)).is_none());
    }
}
