//! `still bench --stages`: how long training steps take, and what memory they need.

use serde::Serialize;
use still_model::{Model, peak_device_bytes, reset_peak_device_bytes};
use still_train::{Objective, Stage, StepTiming, time_steps};

use crate::args::{BenchArgs, TrainingStage};
use crate::commands::read_recipe;
use crate::errors::user;
use crate::memory;
use crate::printer::Printer;
use crate::table;

/// One line of the result.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    timing: StepTiming,
    /// What stage 2 minimises.
    #[serde(skip_serializing_if = "Option::is_none")]
    objective: Option<Objective>,
    /// Of the process so far, the model included.
    peak_rss_bytes: Option<u64>,
    /// Of the GPU's memory by this line's steps, the model included; absent on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_device_bytes: Option<u64>,
    threads: usize,
}

/// Times the steps of each stage at each context.
///
/// # Errors
/// A recipe that does not fit the model.
pub fn run(
    args: &BenchArgs,
    model: &Model,
    contexts: &[usize],
    printer: &Printer,
) -> anyhow::Result<()> {
    if args.steps == 0 {
        return Err(user("--steps 0 times nothing", "use 1 or more"));
    }
    let recipe = read_recipe(args.recipe.as_deref(), &args.set)?;
    let mut lines = Vec::new();
    for &stage in &args.stages {
        let stage = match stage {
            TrainingStage::Transfer => Stage::Transfer,
            TrainingStage::Finetune => Stage::Finetune,
        };
        for &context in contexts {
            reset_peak_device_bytes(model.device())?;
            let line = Line {
                timing: time_steps(model, &recipe, stage, context, args.steps)?,
                objective: (stage == Stage::Finetune).then_some(recipe.finetune.objective),
                peak_rss_bytes: memory::peak_resident_bytes(),
                peak_device_bytes: peak_device_bytes(model.device())?,
                threads: rayon::current_num_threads(),
            };
            if args.json {
                printer.json_line(&line)?;
            } else {
                printer.step("Timed", format_args!("{} at {context} tokens", stage.name()));
            }
            lines.push(line);
        }
    }
    if args.json { Ok(()) } else { Ok(printer.result(render(&lines))?) }
}

fn render(lines: &[Line]) -> String {
    let headers =
        ["stage", "context", "batch", "step p50 ms", "slowest ms", "tok/s", "peak memory"];
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let timing = &line.timing;
            let peak = line.peak_device_bytes.or(line.peak_rss_bytes);
            vec![
                timing.stage.name().to_owned(),
                timing.context.to_string(),
                timing.batch.to_string(),
                format!("{:.1}", timing.step_p50_ms),
                format!("{:.1}", timing.step_max_ms),
                format!("{:.0}", timing.tokens_per_s),
                peak.map_or_else(String::new, |bytes| table::bytes(bytes as usize)),
            ]
        })
        .collect();
    table::render(&headers, &rows)
}
