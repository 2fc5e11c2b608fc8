//! `still linearize --dry-run`: what a run would be.

use serde_json::json;
use still_model::Model;
use still_train::{CachePlan, Plan, TokenCache, plan};

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
    let recipe = &settings.inputs.recipe;
    let windows = read_data(&settings.inputs.data, recipe, model, &TokenCache::user()?, printer)?;
    let bar = Bar::new(printer, "Timing", "one step of each stage", 0, "");
    let plan = plan(model, recipe, &windows)?;
    drop(bar);
    if settings.json {
        let seconds: f64 = plan.stages.iter().map(|stage| stage.seconds).sum();
        return printer.json(&json!({
            "weights_bytes": plan.weights_bytes,
            "timed_tokens": plan.timed_tokens,
            "stages": plan.stages,
            "peak_bytes": peak_bytes(&plan),
            "cache": plan.cache,
            "seconds": seconds,
        }));
    }
    printer.result(render(&plan))?;
    printer.result(format_args!("\n{}", cache_line(&plan.cache)))?;
    printer.note(format_args!(
        "memory is counted from shapes (weights: {}); time is that of one step of each stage on this machine, on a \
         window of {} tokens; evaluations and checkpoints come on top",
        table::bytes(plan.weights_bytes),
        plan.timed_tokens,
    ));
    Ok(())
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

fn render(plan: &Plan) -> String {
    let headers =
        ["stage", "trained values", "steps", "tokens", "longest window", "peak memory", "time"];
    let mut rows: Vec<Vec<String>> = plan
        .stages
        .iter()
        .map(|stage| {
            vec![
                stage.stage.name().into(),
                stage.parameters.to_string(),
                stage.steps.to_string(),
                stage.tokens.to_string(),
                stage.longest_window.to_string(),
                table::bytes(stage.peak_bytes),
                duration(stage.seconds),
            ]
        })
        .collect();
    let sum = |of: fn(&still_train::StagePlan) -> usize| -> String {
        plan.stages.iter().map(of).sum::<usize>().to_string()
    };
    rows.push(vec![
        "whole run".into(),
        String::new(),
        sum(|stage| stage.steps),
        sum(|stage| stage.tokens),
        String::new(),
        table::bytes(peak_bytes(plan)),
        duration(plan.stages.iter().map(|stage| stage.seconds).sum()),
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
