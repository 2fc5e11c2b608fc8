//! `still bench train`: time and memory of training steps.

use clap::Args;
use serde::Serialize;
use still_model::{peak_device_bytes, reset_peak_device_bytes};
use still_train::{BuiltIn, Objective, Recipe, Stage, StepTiming, time_steps};

use super::{OutputArgs, Subject, SubjectArgs};
use crate::args::{COUNT, one_of, whole};
use crate::commands::recipe::RecipeArgs;
use crate::memory;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

const EXAMPLES: &str = "\
Examples:
  still bench train --model org/name --contexts 1024
  still bench train --shape llama-3.1-8b --device cuda --contexts 8192
  still bench train --model base --stages finetune --set finetune.recompute=mlp";

/// `still bench train`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainBenchArgs {
    /// The teacher.
    #[command(flatten)]
    subject: SubjectArgs,
    /// Stages to time
    #[arg(long, value_name = "S,…", value_delimiter = ',', default_value = "transfer,finetune", value_parser = one_of(&Stage::ALL, Stage::name))]
    stages: Vec<Stage>,
    /// Steps timed of each stage
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = whole(1, COUNT))]
    steps: usize,
    /// How it is trained.
    #[command(flatten)]
    recipe: RecipeArgs,
    /// How results are printed.
    #[command(flatten)]
    output: OutputArgs,
}

/// What is timed.
#[derive(Debug)]
pub struct Settings {
    subject: Subject,
    stages: Vec<Stage>,
    steps: usize,
    recipe: Recipe,
    json: bool,
}

impl TrainBenchArgs {
    /// Reads the recipe.
    ///
    /// # Errors
    /// Nothing to time, a recipe that cannot be used, a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        Ok(Settings {
            recipe: self.recipe.resolve(BuiltIn::UNIFORM)?,
            subject: self.subject.resolve()?,
            stages: self.stages,
            steps: self.steps,
            json: self.output.json,
        })
    }
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    timing: StepTiming,
    /// What stage 2 minimizes.
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
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let model = settings.subject.load(printer)?;
    let recipe = &settings.recipe;
    let mut lines = Vec::new();
    let timings = settings.stages.len() * settings.subject.contexts.len();
    let bar = Bar::new(printer, "Timing", "training steps", timings, "timings");
    for &stage in &settings.stages {
        for &context in &settings.subject.contexts {
            bar.message(format!("{} at {context} tokens", stage.name()));
            reset_peak_device_bytes(model.device())?;
            let line = Line {
                timing: time_steps(&model, recipe, stage, context, settings.steps)?,
                objective: (stage == Stage::Finetune).then_some(recipe.finetune.objective),
                peak_rss_bytes: memory::peak_resident_bytes(),
                peak_device_bytes: peak_device_bytes(model.device())?,
                threads: rayon::current_num_threads(),
            };
            bar.advance(1);
            if settings.json {
                printer.json_line(&line)?;
            } else {
                printer.step("Timed", format_args!("{} at {context} tokens", stage.name()));
            }
            lines.push(line);
        }
    }
    drop(bar);
    if settings.json { Ok(()) } else { Ok(printer.result(render(&lines))?) }
}

fn render(lines: &[Line]) -> String {
    let headers =
        ["stage", "context", "batch", "step p50 ms", "slowest ms", "tokens/s", "peak memory"];
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
