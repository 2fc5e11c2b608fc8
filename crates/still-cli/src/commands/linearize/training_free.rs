//! `still linearize --training-free`: calibration alone.

use serde_json::json;
use still_model::{Model, save_student_to};
use still_train::{CalibrationPlan, TokenCache, plan_training_free};

use super::args::Settings;
use super::dry_run::{cache_line, duration};
use super::observer::RunObserver;
use super::places::Places;
use crate::commands::calibration_bars::phase_name;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::shown::in_shell;
use crate::table;

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
    printer.note(format_args!("talk to it: still chat --model {}", in_shell(&settings.out)));
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

/// Says what [`run`] would read, and how long it would take. Nothing is written.
///
/// # Errors
/// As [`plan_training_free`].
pub fn plan(settings: &Settings, model: &Model, printer: &Printer) -> anyhow::Result<()> {
    let inputs = &settings.inputs;
    let bar = Bar::new(printer, "Timing", "calibration on one window", 0, "");
    let plan = plan_training_free(model, &inputs.recipe, &inputs.data, &TokenCache::user()?)?;
    drop(bar);
    let seconds = plan.phases.iter().map(|phase| phase.seconds).sum();
    if settings.json {
        return printer.json(&json!({
            "heads": plan.heads,
            "candidates": plan.candidates,
            "timed_tokens": plan.timed_tokens,
            "phases": plan.phases,
            "cache": plan.cache,
            "seconds": seconds,
        }));
    }
    if plan.phases.is_empty() {
        printer.result("nothing to calibrate: the recipe has budgets")?;
    } else {
        printer.result(render(&plan, seconds))?;
    }
    printer.result(format_args!("\n{}", cache_line(&plan.cache)))?;
    if !plan.phases.is_empty() {
        printer.note(format_args!(
            "time is that of a calibration on this machine on {} tokens of text; each of {} heads gets one of {} budgets",
            plan.timed_tokens,
            plan.heads,
            plan.candidates.len(),
        ));
    }
    Ok(())
}

fn render(plan: &CalibrationPlan, seconds: f64) -> String {
    let mut rows: Vec<Vec<String>> = plan
        .phases
        .iter()
        .map(|phase| {
            let name = phase_name(phase.phase).to_owned();
            vec![name, phase.tokens.to_string(), duration(phase.seconds)]
        })
        .collect();
    let tokens: usize = plan.phases.iter().map(|phase| phase.tokens).sum();
    rows.push(vec!["calibration".into(), tokens.to_string(), duration(seconds)]);
    table::render(&["phase", "tokens", "time"], &rows)
}
