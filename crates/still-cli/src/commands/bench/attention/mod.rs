//! `still bench attention`: the operator of one layer alone, compared with the ceilings of its device.

mod args;

use serde::Serialize;
use still_attention::{AttentionError, HeadGeometry, RowDtype};
use still_eval::EvalError;
use still_eval::operator::{Ceilings, OperatorBench, OperatorOptions, OperatorPoint, Pass};
use still_model::ModelError;

pub use self::args::AttentionBenchArgs;
use self::args::{Settings, Timed};
use super::room;
use crate::errors::user;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

/// One line of the result.
#[derive(Debug, Serialize)]
struct Line<'a> {
    op: &'static str,
    variant: &'static str,
    device: &'a str,
    compute_dtype: &'static str,
    #[serde(flatten)]
    geometry: HeadGeometry,
    batch: usize,
    /// Null where attention is dense, as `cap` where there is none.
    budget: Option<usize>,
    cap: Option<usize>,
    /// Of a decode step's state.
    cache_dtype: RowDtype,
    #[serde(flatten)]
    point: OperatorPoint,
    #[serde(flatten)]
    ceilings: Ceilings,
    threads: usize,
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let &Settings { geometry, batch, rows, repetitions, .. } = settings;
    let (device, dtype) = (&settings.place.device, settings.place.dtype);
    let bar = Bar::uncounted(printer, "Measuring", "what the device reaches at most");
    let bench = OperatorBench::new(device, dtype)?;
    drop(bar);
    let mut lines = Vec::new();
    let passes: usize = settings.variants.iter().map(|variant| variant.passes.len()).sum();
    let timings = passes * settings.contexts.len();
    let bar = Bar::new(printer, "Timing", "the operator", timings, "timings");
    for &Timed { name, hybrid, ref passes } in &settings.variants {
        let options = OperatorOptions { geometry, batch, hybrid, rows, repetitions };
        for &context in &settings.contexts {
            if device.is_cpu() {
                room::check_operator(geometry, batch, context)?;
            }
            for &pass in passes {
                bar.message(format!("{name} {} at {context} tokens", word(pass)));
                let point = bench.time(&options, pass, context).map_err(named)?;
                bar.advance(1);
                let line = Line {
                    op: "attention",
                    variant: name,
                    device: &settings.place.name,
                    compute_dtype: dtype.as_str(),
                    geometry,
                    batch,
                    budget: hybrid.map(|hybrid| hybrid.budget),
                    cap: hybrid.and_then(|hybrid| hybrid.cap),
                    cache_dtype: rows,
                    point,
                    ceilings: bench.ceilings,
                    threads: rayon::current_num_threads(),
                };
                if settings.json {
                    printer.json_line(&line)?;
                } else {
                    let pass = word(pass);
                    printer.step("Timed", format_args!("{name} {pass} at {context} tokens"));
                }
                lines.push(line);
            }
        }
    }
    drop(bar);
    if settings.json { Ok(()) } else { Ok(printer.result(render(&lines, &bench.ceilings))?) }
}

fn word(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "forward",
        Pass::ForwardBackward => "forward + backward",
        Pass::Decode => "decode step",
    }
}

/// What the operator refuses is a wrong option here, not a broken model.
fn named(error: EvalError) -> anyhow::Error {
    match error {
        EvalError::Model(ModelError::Attention(
            error @ (AttentionError::Config(_) | AttentionError::Unsupported { .. }),
        )) => user(
            error.to_string(),
            "change the heads, --head-dim, --budget or --cap; docs/cuda.md says what a GPU computes",
        ),
        error => error.into(),
    }
}

fn render(lines: &[Line<'_>], ceilings: &Ceilings) -> String {
    let headers = [
        "variant",
        "pass",
        "context",
        "ms",
        "p10",
        "p90",
        "TFLOP/s",
        "of product",
        "GB/s",
        "of copy",
    ];
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let point = &line.point;
            let ms = |ms: f64| format!("{ms:.4}");
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            vec![
                line.variant.to_owned(),
                word(point.pass).to_owned(),
                point.context.to_string(),
                ms(point.median_ms),
                ms(point.p10_ms),
                ms(point.p90_ms),
                format!("{:.3}", point.tflop_per_s),
                percent(point.share_of_product),
                format!("{:.1}", point.gb_per_s),
                percent(point.share_of_copy),
            ]
        })
        .collect();
    let mut text = table::render(&headers, &rows);
    if let Some(line) = lines.last() {
        let HeadGeometry { num_heads, num_key_value_heads, head_dim } = line.geometry;
        text += &format!(
            "\n\n{} sequences, {num_heads} query and {num_key_value_heads} key/value heads of {head_dim}, {} on {}; {} threads\n",
            line.batch, line.compute_dtype, line.device, line.threads,
        );
    }
    text + &format!(
        "a product of {0} × {0} matrices: {1:.3} TFLOP/s; a copy of {2}: {3:.1} GB/s",
        ceilings.product_size,
        ceilings.product_tflop_per_s,
        table::bytes(ceilings.copied_bytes),
        ceilings.copy_gb_per_s,
    )
}
