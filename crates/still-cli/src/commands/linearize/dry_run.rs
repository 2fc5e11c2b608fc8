//! `still linearize --dry-run`: estimates of a run.

use serde_json::json;
use still_model::Model;
use still_train::{CachePlan, PhasePlan, Plan, TokenCache, plan, plan_calibration};

use super::args::Settings;
use super::read_data;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

/// Plans the run and prints it. Nothing is written.
///
/// # Errors
/// Data or a recipe that cannot be used.
pub fn run(settings: &Settings, model: &Model, printer: &Printer) -> anyhow::Result<()> {
    if settings.out.symlink_metadata().is_ok() {
        printer.warn(format_args!(
            "{} exists already: the run needs another --out, or --overwrite",
            settings.out.display()
        ));
    }
    let (data, recipe) = (&settings.inputs.data, &settings.inputs.recipe);
    let cache = TokenCache::user()?;
    let windows = read_data(data, recipe, model, &cache, printer)?;
    let bar = Bar::new(printer, "Timing", "one step of each stage", 0, "");
    let plan = plan(model, recipe, &windows)?;
    drop(bar);
    let bar = Bar::new(printer, "Timing", "calibration on one window", 0, "");
    let calibration = plan_calibration(model, recipe, data, &cache)?.phases;
    drop(bar);
    if settings.json {
        return printer.json(&json!({
            "weights_bytes": plan.weights_bytes,
            "timed_tokens": plan.timed_tokens,
            "calibration": calibration,
            "stages": plan.stages,
            "peak_bytes": peak_bytes(&plan),
            "cache": plan.cache,
            "seconds": seconds(&plan, &calibration),
        }));
    }
    printer.result(render(&plan, &calibration))?;
    printer.result(format_args!("\n{}", cache_line(&plan.cache)))?;
    let of_calibration = match calibration.is_empty() {
        true => "",
        false => ", and of a calibration on one window, whose memory is not counted",
    };
    printer.note(format_args!(
        "memory is counted from shapes (weights: {}); time is that of one step of each stage on this machine, on a \
         window of {} tokens{of_calibration}; evaluations, checkpoints and the verdict come on top",
        table::bytes(plan.weights_bytes),
        table::count(plan.timed_tokens),
    ));
    Ok(())
}

/// Of the whole run.
fn seconds(plan: &Plan, calibration: &[PhasePlan]) -> f64 {
    let stages: f64 = plan.stages.iter().map(|stage| stage.seconds).sum();
    stages + calibration.iter().map(|phase| phase.seconds).sum::<f64>()
}

/// Stages follow each other: the larger one decides.
fn peak_bytes(plan: &Plan) -> usize {
    plan.stages.iter().map(|stage| stage.peak_bytes).max().unwrap_or(plan.weights_bytes)
}

/// `cache of 8,192 tokens: at most 36.0 MiB of 180.0 MiB dense, 20 %`
pub(super) fn cache_line(cache: &CachePlan) -> String {
    let CachePlan { at_length, bytes, at_most, dense_bytes } = *cache;
    format!(
        "cache of {} tokens: {}{} of {} dense, {:.0} %",
        table::count(at_length),
        if at_most { "at most " } else { "" },
        table::bytes(bytes),
        table::bytes(dense_bytes),
        100.0 * bytes as f64 / dense_bytes.max(1) as f64,
    )
}

fn render(plan: &Plan, calibration: &[PhasePlan]) -> String {
    let headers =
        ["stage", "trained values", "steps", "tokens", "longest window", "peak memory", "time"];
    let calibrated = calibration.iter().map(|phase| phase.tokens).sum::<usize>();
    let none = || "–".to_owned();
    let mut rows = Vec::new();
    if !calibration.is_empty() {
        let seconds = calibration.iter().map(|phase| phase.seconds).sum();
        rows.push(vec![
            "calibration".into(),
            none(),
            none(),
            table::count(calibrated),
            none(),
            none(),
            duration(seconds),
        ]);
    }
    rows.extend(plan.stages.iter().map(|stage| {
        vec![
            stage.stage.name().into(),
            table::count(stage.parameters),
            table::count(stage.steps),
            table::count(stage.tokens),
            table::count(stage.longest_window),
            table::bytes(stage.peak_bytes),
            duration(stage.seconds),
        ]
    }));
    let sum = |of: fn(&still_train::StagePlan) -> usize| plan.stages.iter().map(of).sum::<usize>();
    rows.push(vec![
        "whole run".into(),
        String::new(),
        table::count(sum(|stage| stage.steps)),
        table::count(sum(|stage| stage.tokens) + calibrated),
        String::new(),
        table::bytes(peak_bytes(plan)),
        duration(seconds(plan, calibration)),
    ]);
    table::render(&headers, &rows)
}

/// `42 s`, `12 min`, `3 h 20 min`.
pub(super) fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0..2 => format!("{seconds:.0} s"),
        2..120 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations_have_the_units_that_people_use() {
        assert_eq!(duration(42.4), "42 s");
        assert_eq!(duration(89.0), "89 s");
        assert_eq!(duration(720.0), "12 min");
        assert_eq!(duration(12_000.0), "3 h 20 min");
    }
}
