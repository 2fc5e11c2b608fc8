//! `still bench --op attention`: the operator of one layer alone, beside what its device reaches at most.

use candle_core::{DType, Device};
use serde::Serialize;
use still_attention::{AttentionError, HeadGeometry, RowDtype};
use still_eval::EvalError;
use still_eval::operator::{Ceilings, Hybrid, OperatorBench, OperatorOptions, OperatorPoint, Pass};
use still_model::ModelError;
use still_model::random::shape as shape_of;

use super::super::{BUDGET, CHUNK, place};
use super::room;
use crate::args::{BenchArgs, CacheDtype, OpPass, OperatorArgs, Variant};
use crate::errors::user;
use crate::printer::Printer;
use crate::table;

/// The shape unless another is asked for.
const SHAPE: &str = "llama-3.1-8b";

const REPETITIONS: usize = 10;

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

pub(super) fn run(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    let plan = plan(args)?;
    let (device, dtype) = place(&args.device)?;
    let rows = rows(args.cache_dtype, &device, dtype)?;
    let contexts = match &args.contexts {
        Some(contexts) => contexts.clone(),
        None if device.is_cpu() => vec![2048, 8192],
        None => vec![8192, 131_072],
    };
    if device.is_cpu() && dtype != DType::F32 {
        return Err(user(
            format!("the operator computes in f32 on the CPU, not in {}", dtype.as_str()),
            "leave --compute-dtype out, or use --device cuda",
        ));
    }
    printer.step("Measuring", "what the device reaches at most");
    let bench = OperatorBench::new(&device, dtype)?;
    let geometry = geometry(args)?;
    let repetitions = args.operator.repetitions.unwrap_or(REPETITIONS);
    let mut lines = Vec::new();
    for (variant, name, passes) in plan {
        let hybrid = (variant == Variant::Still).then_some(Hybrid {
            chunk: CHUNK,
            budget: args.operator.budget.unwrap_or(BUDGET),
            cap: args.cap,
        });
        let options = OperatorOptions { geometry, batch: args.batch, hybrid, rows, repetitions };
        for &context in &contexts {
            if device.is_cpu() {
                room::check_operator(geometry, args.batch, context)?;
            }
            for &pass in &passes {
                let point = bench.time(&options, pass, context).map_err(named)?;
                let line = Line {
                    op: "attention",
                    variant: name,
                    device: &args.device.device,
                    compute_dtype: dtype.as_str(),
                    geometry,
                    batch: args.batch,
                    budget: hybrid.map(|hybrid| hybrid.budget),
                    cap: hybrid.and_then(|hybrid| hybrid.cap),
                    cache_dtype: rows,
                    point,
                    ceilings: bench.ceilings,
                    threads: rayon::current_num_threads(),
                };
                if args.json {
                    printer.json_line(&line)?;
                } else {
                    let pass = word(pass);
                    printer.step("Timed", format_args!("{name} {pass} at {context} tokens"));
                }
                lines.push(line);
            }
        }
    }
    if args.json { Ok(()) } else { Ok(printer.result(render(&lines, &bench.ceilings))?) }
}

/// What is timed of each variant.
fn plan(args: &BenchArgs) -> anyhow::Result<Vec<(Variant, &'static str, Vec<Pass>)>> {
    if args.operator.repetitions == Some(0) {
        return Err(user("--repetitions 0 times nothing", "use 1 or more"));
    }
    let asked = |all: &[Pass]| match &args.operator.passes {
        Some(passes) => passes.iter().map(|&pass| of(pass)).collect(),
        None => all.to_vec(),
    };
    let variants = args.variants.iter().map(|&variant| match variant {
        Variant::Still => {
            Ok((variant, "still", asked(&[Pass::Forward, Pass::ForwardBackward, Pass::Decode])))
        }
        Variant::Dense => {
            let passes = asked(&[Pass::Forward, Pass::Decode]);
            if passes.contains(&Pass::ForwardBackward) {
                return Err(user(
                    "the variant `dense` has no pass `forward-backward`: the teacher's attention is not trained",
                    "leave the pass out of --passes, or `dense` out of --variants",
                ));
            }
            Ok((variant, "dense", passes))
        }
        Variant::Window | Variant::Student => Err(user(
            format!("--op attention has no variant `{variant:?}`").to_lowercase(),
            "give dense or still as --variants, or a model to time instead of --op",
        )),
    });
    variants.collect()
}

fn of(pass: OpPass) -> Pass {
    match pass {
        OpPass::Forward => Pass::Forward,
        OpPass::ForwardBackward => Pass::ForwardBackward,
        OpPass::Decode => Pass::Decode,
    }
}

fn word(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "forward",
        Pass::ForwardBackward => "forward + backward",
        Pass::Decode => "decode step",
    }
}

/// The heads that are asked for, or else those of a shape.
fn geometry(args: &BenchArgs) -> anyhow::Result<HeadGeometry> {
    let shape = shape_of(args.shape.as_deref().unwrap_or(SHAPE))?.geometry();
    let OperatorArgs { heads, kv_heads, head_dim, .. } = args.operator;
    let geometry = HeadGeometry {
        num_heads: heads.unwrap_or(shape.num_heads),
        num_key_value_heads: kv_heads.unwrap_or(shape.num_key_value_heads),
        head_dim: head_dim.unwrap_or(shape.head_dim),
    };
    let HeadGeometry { num_heads, num_key_value_heads, head_dim } = geometry;
    if num_heads == 0 || num_key_value_heads == 0 || head_dim == 0 {
        return Err(user("there are no heads to time", "give head counts and --head-dim above 0"));
    }
    if num_heads % num_key_value_heads != 0 {
        return Err(user(
            format!("{num_heads} query heads cannot share {num_key_value_heads} key/value heads"),
            "give --heads a multiple of --kv-heads",
        ));
    }
    Ok(geometry)
}

/// How a state stores exact rows: on the CPU as asked for, on CUDA as it computes.
fn rows(asked: Option<CacheDtype>, device: &Device, dtype: DType) -> anyhow::Result<RowDtype> {
    let asked = asked.map(|asked| match asked {
        CacheDtype::F32 => RowDtype::F32,
        CacheDtype::Bf16 => RowDtype::Bf16,
        CacheDtype::F16 => RowDtype::F16,
        CacheDtype::Int8 => RowDtype::Int8,
    });
    if device.is_cpu() {
        return Ok(asked.unwrap_or(RowDtype::Bf16));
    }
    let computed = if dtype == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 };
    match asked {
        Some(rows) if rows != computed => Err(user(
            format!("a state on CUDA stores rows as it computes, in {}", dtype.as_str()),
            "leave --cache-dtype out, or change --compute-dtype",
        )),
        _ => Ok(computed),
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
