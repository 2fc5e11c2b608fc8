//! `still linearize --training-free`: calibration alone.

use serde_json::json;
use still_model::{Model, save_student_to};
use still_train::TokenCache;

use super::args::Settings;
use super::observer::RunObserver;
use super::places::Places;
use crate::printer::Printer;
use crate::progress::Bar;

/// Calibrates and writes the student, and says that it is not trained.
///
/// # Errors
/// As [`still_train::training_free`]; a full disk.
pub fn run(
    settings: &Settings,
    model: &Model,
    places: &Places,
    cache: &TokenCache,
    mut observer: RunObserver<'_>,
    printer: &Printer,
) -> anyhow::Result<()> {
    let (inputs, run_dir) = (&settings.inputs, &places.run_dir);
    let data = &inputs.data;
    observer.calibrating();
    let student =
        still_train::training_free(model, &inputs.recipe, data, cache, run_dir, &mut observer)?;
    observer.finish();
    let bar = Bar::new(printer, "Saving", "the student", 0, "");
    save_student_to(&places.student, &student, settings.kind)?;
    drop(bar);
    printer.step("Saved", format_args!("{}, not trained", settings.out.display()));
    let Some(student) = &student.student else {
        anyhow::bail!("a student without its attention");
    };
    let config = &student.config;
    let budgets: Vec<usize> = config.budgets.iter().flatten().copied().collect();
    let whole = budgets.iter().filter(|&&budget| budget == config.chunk).count();
    printer.note(format_args!(
        "{whole} of {} heads keep all tokens, every head at least {} of {}; its linear branch is as it starts: train it by the \
         same command with --overwrite in place of --training-free",
        budgets.len(),
        budgets.iter().min().copied().unwrap_or(0),
        config.chunk,
    ));
    printer.note(format_args!("talk to it: still chat --model {}", settings.out.display()));
    if settings.json {
        printer.json(&json!({
            "out": settings.out.display().to_string(),
            "run_dir": run_dir.path().display().to_string(),
            "export": if settings.kind.is_delta() { "delta" } else { "full" },
            "trained": false,
            "heads": budgets.len(),
            "whole_heads": whole,
        }))?;
    }
    Ok(())
}
