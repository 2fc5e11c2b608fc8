//! The demo's budgets: found on its own training text.

use still_attention::StillConfig;
use still_model::Model;
use still_train::{AttentionRecipe, CalibrateOptions};

use super::text::{DemoText, EVAL_WINDOW};
use crate::commands::calibration_bars;
use crate::printer::Printer;

/// The default attention with a budget for every head: the usual share of the dense cache after as many tokens as the demo reads.
///
/// # Errors
/// As [`still_train::calibrate`].
pub fn calibrate(
    teacher: &Model,
    text: &DemoText,
    seed: u64,
    printer: &Printer,
) -> anyhow::Result<StillConfig> {
    let recipe = AttentionRecipe::default();
    let cache_fraction = CalibrateOptions::usual_cache_fraction(teacher.config(), EVAL_WINDOW);
    let usual = CalibrateOptions::default();
    let options = CalibrateOptions { cache_fraction, at_length: EVAL_WINDOW, seed, ..usual };
    let found =
        calibration_bars::calibrate(teacher, &recipe, &text.calibration, &options, printer)?;
    let whole = found.heads.iter().filter(|head| head.budget == found.budgets.chunk).count();
    printer.step(
        "Student",
        format_args!(
            "{whole} of {} heads keep every token, the others a few of every {}; the rest goes into linear states \
             ({:.0} % of the dense cache at {} tokens)",
            found.heads.len(),
            found.budgets.chunk,
            100.0 * found.cache_bytes as f64 / found.dense_bytes as f64,
            found.budgets.at_length,
        ),
    );
    Ok(found.budgets.apply(&recipe)?.resolve(teacher.config())?)
}
