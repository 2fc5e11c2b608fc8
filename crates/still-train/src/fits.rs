//! Whether a run fits into memory, before it begins: a process that takes more than there is gets killed without a word.

use still_model::{LoraConfig, LoraTarget, Model, ModelConfig, Student};

use crate::data::Windows;
use crate::error::{Result, TrainError};
use crate::memory;
use crate::metrics::Stage;
use crate::plan::{Sizes, Values};
use crate::recipe::Recipe;

/// The share of an estimate that must be free: estimates are this much too high at the most.
const LEAST_SHARE: f64 = 0.7;

/// Refuses stages that cannot fit, by the same count of shapes as a plan's. A device's memory is not asked for: its own errors
/// say what is full.
///
/// # Errors
/// What a stage needs, what is free, and what to lower.
pub(crate) fn check(
    model: &Model,
    student: &Student,
    recipe: &Recipe,
    windows: &Windows,
) -> Result<()> {
    if !model.device().is_cpu() {
        return Ok(());
    }
    let Some(free) = memory::free_bytes() else { return Ok(()) };
    let sizes = Sizes::new(model)?;
    let (tokens, learned) = (windows.longest(), student.parameters());
    // Token ids of a step's windows.
    let ids = |batch: usize| batch.saturating_mul(tokens * 4);
    if recipe.transfer.steps > 0 {
        let (batch, values) =
            (recipe.transfer.batch, Values { trained: learned, student: learned });
        let needed = sizes.transfer(&values, tokens, batch) + ids(batch) - sizes.weights;
        refuse(Stage::Transfer, needed, free, "transfer.batch, data.length")?;
    }
    if recipe.finetune.steps > 0 {
        let low_rank = low_rank_values(&recipe.finetune.lora, model.config());
        let values = Values { trained: learned + low_rank, student: learned + low_rank };
        let needed =
            sizes.finetune(&values, tokens, recipe) + ids(recipe.finetune.batch) - sizes.weights;
        let what =
            "data.length, finetune.batch, finetune.lora.rank; or set finetune.recompute = true";
        refuse(Stage::Finetune, needed, free, what)?;
    }
    Ok(())
}

/// Values of all low-rank updates.
fn low_rank_values(lora: &LoraConfig, config: &ModelConfig) -> usize {
    let (e, d) = (config.hidden_size, config.head_dim);
    let (q, k) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let width = |target: &LoraTarget| match target {
        LoraTarget::K | LoraTarget::V => e + k,
        _ => e + q,
    };
    let widths: usize = lora.targets.iter().map(width).sum();
    config.full_layers().count() * widths * lora.rank
}

fn refuse(stage: Stage, needed: usize, free: u64, what: &str) -> Result<()> {
    if needed as f64 * LEAST_SHARE <= free as f64 {
        return Ok(());
    }
    let gibibytes = |bytes: f64| format!("{:.1} GiB", bytes / f64::from(1 << 30));
    Err(TrainError::Recipe {
        what: format!(
            "stage {} would take about {} beside the model, {} are free",
            stage.name(),
            gibibytes(needed as f64),
            gibibytes(free as f64)
        ),
        hint: format!("lower {what}"),
    })
}
