//! `still bench model`: prefill and decode speed, by context and kind of attention.

use clap::{Args, ValueEnum};
use serde::Serialize;
use still_attention::{RowDtype, StateBytes, StillConfig};
use still_eval::{BenchPoint, ModelBench};
use still_model::{FeatureInit, Model, Student, peak_device_bytes};

use super::{OutputArgs, StateArgs, Subject, SubjectArgs, room, something_to_time};
use crate::args::{TOKENS, whole};
use crate::commands::cache::CacheRows;
use crate::commands::{BUDGET, CHUNK};
use crate::errors::user;
use crate::memory;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

const EXAMPLES: &str = "\
Examples:
  still bench model --model my-student --variants dense,still,student
  still bench model --shape llama-3.1-8b --device cuda --batch 8 --json
  still bench model --model base --contexts 2048,32768 --cap 512 --in-turn";

/// `still bench model`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ModelBenchArgs {
    /// The model.
    #[command(flatten)]
    subject: SubjectArgs,
    /// Also read N tokens onto each context's state after decoding, as a conversation's next turn is, and time them
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = whole(0, TOKENS))]
    onto: usize,
    /// Tokens decoded at each context
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = whole(0, TOKENS))]
    new_tokens: usize,
    /// Read all contexts first, then decode 16 tokens of each in turn: a drift of the machine's speed is then the same for all
    #[arg(long)]
    in_turn: bool,
    /// Give every sequence a cache of its own, as `still serve` does; one prompt is read for all
    #[arg(long)]
    separate: bool,
    /// Attention to time, each at every context
    #[arg(
        long,
        value_name = "V,…",
        value_delimiter = ',',
        value_enum,
        default_value = "dense,still"
    )]
    variants: Vec<Variant>,
    /// What is decoded with.
    #[command(flatten)]
    state: StateArgs,
    /// How results are printed.
    #[command(flatten)]
    output: OutputArgs,
}

/// Attention that is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Variant {
    /// The base's softmax attention.
    Dense,
    /// Nothing but the sliding window.
    Window,
    /// 4 tokens kept of every 64 by every KV head, whatever the model.
    Still,
    /// The student as it is.
    Student,
}

/// What is timed.
#[derive(Debug)]
pub struct Settings {
    subject: Subject,
    onto: usize,
    new_tokens: usize,
    in_turn: bool,
    separate: bool,
    batch: usize,
    variants: Vec<Variant>,
    cap: Option<usize>,
    rows: CacheRows,
    json: bool,
}

impl ModelBenchArgs {
    /// # Errors
    /// Nothing to time; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        something_to_time(&[self.new_tokens, self.state.batch])?;
        let subject = self.subject.resolve()?;
        Ok(Settings {
            rows: self.state.cache.resolve(&subject.place, RowDtype::Bf16)?,
            subject,
            onto: self.onto,
            new_tokens: self.new_tokens,
            in_turn: self.in_turn,
            separate: self.separate,
            batch: self.state.batch,
            variants: self.variants,
            cap: self.state.cap,
            json: self.output.json,
        })
    }
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Line {
    variant: &'static str,
    /// How its cache stores exact rows.
    cache_dtype: RowDtype,
    #[serde(flatten)]
    point: BenchPoint,
    /// `cache_bytes` by what they hold; absent on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_parts: Option<StateBytes>,
    /// Of `cache_bytes`, without room to grow into.
    used_cache_bytes: usize,
    /// Of the process so far, the model included.
    peak_rss_bytes: Option<u64>,
    /// The same of the GPU's memory; absent on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_device_bytes: Option<u64>,
    threads: usize,
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let model = settings.subject.load(printer)?;
    let mut lines = Vec::new();
    let timings = settings.variants.len() * settings.subject.contexts.len();
    let bar = Bar::new(printer, "Timing", "prefill and decode", timings, "timings");
    for &variant in &settings.variants {
        let (name, model) = variant_of(variant, settings.cap, &model)?;
        let (batch, rows) = (settings.batch, settings.rows.told(&model, printer));
        let (contexts, new_tokens) = (&settings.subject.contexts, settings.new_tokens);
        contexts.iter().try_for_each(|&context| {
            room::check(&model, batch, context + settings.onto, new_tokens, rows)
        })?;
        let bench = match settings.separate {
            false => ModelBench::new(&model, batch, rows)?,
            true => ModelBench::new(&model, 1, rows)?.with_separate_caches(batch)?,
        };
        let bench = bench.reading_onto(settings.onto);
        bar.message(name);
        let mut report = |point: BenchPoint| -> anyhow::Result<()> {
            bar.advance(1);
            let line = Line {
                variant: name,
                cache_dtype: rows,
                cache_parts: point.cache_parts,
                used_cache_bytes: point.used_cache_bytes,
                point,
                peak_rss_bytes: memory::peak_resident_bytes(),
                peak_device_bytes: peak_device_bytes(model.device())?,
                threads: rayon::current_num_threads(),
            };
            if settings.json {
                printer.json_line(&line)?;
            } else {
                let context = line.point.context;
                printer.step("Timed", format_args!("{name} at {context} tokens"));
            }
            lines.push(line);
            Ok(())
        };
        if settings.in_turn {
            bench.time_alternating(contexts, new_tokens)?.into_iter().try_for_each(report)?;
        } else {
            contexts.iter().try_for_each(|&context| report(bench.time(context, new_tokens)?))?;
        }
    }
    drop(bar);
    if settings.json { Ok(()) } else { Ok(printer.result(render(&lines))?) }
}

/// The model with the attention that a variant stands for.
fn variant_of(
    variant: Variant,
    cap: Option<usize>,
    model: &Model,
) -> anyhow::Result<(&'static str, Model)> {
    let (layers, geometry) = (model.config().num_hidden_layers, model.config().geometry());
    // Untrained feature maps cost what trained ones do.
    let with = |still: StillConfig| -> anyhow::Result<Model> {
        let still = model.config().fit_still(still);
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

/// What the caches hold, where that is known.
fn render_parts(lines: &[Line]) -> String {
    let names = StateBytes::default().parts().map(|(name, _)| name);
    let headers: Vec<&str> = ["variant", "context"].into_iter().chain(names).collect();
    let row = |line: &Line| {
        let parts = line.cache_parts?.parts();
        let bytes = parts.iter().map(|&(_, bytes)| table::bytes(bytes));
        let first = [line.variant.to_owned(), line.point.context.to_string()];
        Some(first.into_iter().chain(bytes).collect())
    };
    let rows: Vec<Vec<String>> = lines.iter().filter_map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\n\ncache by what it holds:\n{}", table::render(&headers, &rows))
}

fn render(lines: &[Line]) -> String {
    let mut headers = vec![
        "variant",
        "context",
        "prefill tokens/s",
        "decode tokens/s",
        "p50 ms",
        "p99 ms",
        "cache",
    ];
    let onto = lines.iter().any(|line| line.point.onto_tokens_per_s.is_some());
    if onto {
        headers.insert(3, "onto tokens/s");
    }
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let point = &line.point;
            let mut row = vec![
                line.variant.to_owned(),
                point.context.to_string(),
                format!("{:.0}", point.prefill_tokens_per_s),
                format!("{:.1}", point.decode_tokens_per_s),
                format!("{:.2}", point.decode_p50_ms),
                format!("{:.2}", point.decode_p99_ms),
                table::bytes(point.cache_bytes),
            ];
            if onto {
                row.insert(3, point.onto_tokens_per_s.map_or(String::new(), |n| format!("{n:.0}")));
            }
            row
        })
        .collect();
    let mut text = table::render(&headers, &rows);
    text += &render_parts(lines);
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
