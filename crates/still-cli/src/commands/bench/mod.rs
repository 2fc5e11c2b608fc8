//! `still bench`: how fast a model reads and writes, by context and kind of attention; or one operator alone.

mod operator;
mod room;
mod stages;

use serde::Serialize;
use still_attention::{RowDtype, StillConfig};
use still_eval::{BenchOptions, BenchPoint};
use still_model::random::{random_model_on, shape as shape_of};
use still_model::{FeatureInit, Model, Student, peak_device_bytes};

use super::{BUDGET, CHUNK, load, place, row_dtype};
use crate::args::{BenchArgs, Op, Variant};
use crate::errors::user;
use crate::memory;
use crate::printer::Printer;
use crate::table;

/// Contexts unless others are asked for.
const CONTEXTS: [usize; 4] = [512, 2048, 4096, 7680];

/// One line of the result.
#[derive(Debug, Serialize)]
struct Line {
    variant: &'static str,
    #[serde(flatten)]
    point: BenchPoint,
    /// Of the process so far, the model included.
    peak_rss_bytes: Option<u64>,
    /// The same of the GPU's memory; absent on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_device_bytes: Option<u64>,
    threads: usize,
}

/// Runs the command.
pub fn run(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    let contexts = args.contexts.as_deref().unwrap_or(&CONTEXTS);
    if args.new_tokens == 0 || args.batch == 0 || contexts.contains(&0) {
        return Err(user(
            "there is nothing to time",
            "give contexts, --batch and --new-tokens above 0",
        ));
    }
    if let Some(Op::Attention) = args.operator.op {
        return operator::run(args, printer);
    }
    let model = match (&args.model, &args.shape) {
        (Some(model), None) => load(model, &args.device, printer)?,
        (None, Some(shape)) => {
            let (device, dtype) = place(&args.device)?;
            printer.step("Making", format_args!("random weights of {shape}"));
            random_model_on(shape_of(shape)?, &device, dtype)?
        }
        _ => return Err(user("bench needs a model", "give --model MODEL or --shape NAME")),
    };
    if !args.stages.is_empty() {
        return stages::run(args, &model, contexts, printer);
    }
    let mut lines = Vec::new();
    for &variant in &args.variants {
        let (name, model) = variant_of(variant, args.cap, &model)?;
        let options = |context, new_tokens| BenchOptions {
            batch: args.batch,
            context,
            new_tokens,
            rows: row_dtype(args.cache_dtype, RowDtype::Bf16, &model),
        };
        contexts
            .iter()
            .try_for_each(|&context| room::check(&model, &options(context, args.new_tokens)))?;
        // The first pass finds memory and threads cold.
        still_eval::bench(&model, options(CHUNK, 2))?;
        let mut report = |point: BenchPoint| -> anyhow::Result<()> {
            let line = Line {
                variant: name,
                point,
                peak_rss_bytes: memory::peak_resident_bytes(),
                peak_device_bytes: peak_device_bytes(model.device())?,
                threads: rayon::current_num_threads(),
            };
            if args.json {
                printer.json_line(&line)?;
            } else {
                let context = line.point.context;
                printer.step("Timed", format_args!("{name} at {context} tokens"));
            }
            lines.push(line);
            Ok(())
        };
        let each: Vec<_> =
            contexts.iter().map(|&context| options(context, args.new_tokens)).collect();
        if args.in_turn {
            still_eval::bench_in_turn(&model, &each)?.into_iter().try_for_each(report)?;
        } else {
            for options in each {
                report(still_eval::bench(&model, options)?)?;
            }
        }
    }
    if args.json { Ok(()) } else { Ok(printer.result(render(&lines))?) }
}

/// The model with the attention that a variant stands for.
fn variant_of(
    variant: Variant,
    cap: Option<usize>,
    model: &Model,
) -> anyhow::Result<(&'static str, Model)> {
    let (layers, geometry) = (model.config().num_hidden_layers, model.config().geometry());
    // Untrained feature maps cost what trained ones do.
    let with = |still| -> anyhow::Result<Model> {
        let student = Student::init(still, model.config(), FeatureInit::Identity, 0)?;
        Ok(model.teacher().with_student(student.to_device(model.device())?))
    };
    Ok(match variant {
        Variant::Dense => ("dense", model.teacher()),
        Variant::Window => ("window", with(StillConfig::window_only(layers, geometry, CHUNK))?),
        Variant::Still => {
            let uniform = StillConfig::uniform(layers, geometry, CHUNK, BUDGET);
            ("still", with(StillConfig { cap, ..uniform })?)
        }
        Variant::Student if model.student.is_some() => ("student", model.clone()),
        Variant::Student => {
            return Err(user(
                "the variant `student` needs a student, and this model is a base",
                "leave it out of --variants, or name a student for --model",
            ));
        }
    })
}

fn render(lines: &[Line]) -> String {
    let headers =
        ["variant", "context", "prefill tok/s", "decode tok/s", "p50 ms", "p99 ms", "cache"];
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let point = &line.point;
            vec![
                line.variant.to_owned(),
                point.context.to_string(),
                format!("{:.0}", point.prefill_tokens_per_s),
                format!("{:.1}", point.decode_tokens_per_s),
                format!("{:.2}", point.decode_p50_ms),
                format!("{:.2}", point.decode_p99_ms),
                table::bytes(point.cache_bytes),
            ]
        })
        .collect();
    let mut text = table::render(&headers, &rows);
    if let Some(line) = lines.last() {
        text += &format!("\n\n{} threads", line.threads);
        if let Some(peak) = line.peak_rss_bytes {
            text += &format!(", at most {} resident", table::bytes(peak as usize));
        }
        if let Some(peak) = line.peak_device_bytes {
            text += &format!(", at most {} on the device", table::bytes(peak as usize));
        }
    }
    text
}
