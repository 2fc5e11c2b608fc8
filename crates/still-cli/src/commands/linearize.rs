//! `still linearize`: both training stages, with checkpoints, then the student.

use std::path::Path;

use candle_core::DType;
use serde_json::json;
use still_model::{ExportKind, Model, save_student_to};
use still_train::{Recipe, TokenCache, Windows, calibrated_recipe, linearize_in};

use super::places::Places;
use super::{check_data, dry_run, load_base, read_recipe};
use crate::args::{ExportDtype, LinearizeArgs};
use crate::commands::observer::RunObserver;
use crate::interrupt;
use crate::plot::number;
use crate::printer::Printer;
use crate::run_log::{LayerLoss, RunLog};
use crate::table;

/// Runs the command.
pub fn run(args: &LinearizeArgs, printer: &Printer) -> anyhow::Result<()> {
    check_data(&args.data)?;
    let recipe = read_recipe(args.recipe.as_deref(), &args.set)?;
    if args.dry_run {
        let model = load_base(&args.model.model, &args.device, "linearize", printer)?;
        return dry_run::run(args, &recipe, &model, printer);
    }
    interrupt::hint("nothing was trained in this start: the same command begins it again");
    let places = Places::claim(args)?;
    let model = load_base(&args.model.model, &args.device, "linearize", printer)?;
    let kind = export_kind(args);
    places.check_room(&model, &recipe, kind)?;
    let run_dir = places.run_dir.path();
    printer.step("Run", run_dir.display());
    let mut observer = RunObserver::new(printer, run_dir, !args.no_tensorboard);
    let cache = TokenCache::user()?;
    let recipe = calibrated_recipe(&model, &recipe, &args.data, &cache, run_dir, &mut observer)?;
    let windows = read_data(args, &recipe, &model, &cache, printer)?;
    let student =
        linearize_in(&model, &recipe, &windows, &places.run_dir, args.resume, &mut observer)?;
    observer.finish();
    interrupt::hint("the run is whole: the same command with --resume writes the student");
    let layers = transfer_layers(&observer, run_dir, printer);
    if !layers.is_empty() {
        printer.table(&layer_table(&layers));
    }
    save_student_to(&places.student, &student, kind)?;
    printer.step("Saved", args.out.display());
    printer.note(format_args!("look at the run: still report {}", run_dir.display()));
    printer.note(format_args!("talk to it: still chat --model {}", args.out.display()));
    if args.json {
        printer.json(&json!({
            "out": args.out.display().to_string(),
            "run_dir": run_dir.display().to_string(),
            "export": if args.delta { "delta" } else { "full" },
            "stages": observer.stages(),
            "layers": layers,
        }))?;
    }
    Ok(())
}

/// First and last losses, from the log: a resumed run has done only a part of the steps itself.
fn transfer_layers(
    observer: &RunObserver<'_>,
    run_dir: &Path,
    printer: &Printer,
) -> Vec<LayerLoss> {
    if observer.stages().is_empty() {
        return Vec::new();
    }
    RunLog::read(run_dir).map(|log| log.layers()).unwrap_or_else(|error| {
        printer.warn(format_args!("no losses of layers: {error}"));
        Vec::new()
    })
}

/// What attention transfer did for every layer, as a table.
pub(super) fn layer_table(layers: &[LayerLoss]) -> String {
    let rows: Vec<Vec<String>> = layers
        .iter()
        .map(|layer| {
            let numbers = [layer.first_loss, layer.last_loss, layer.ratio].map(number);
            [layer.layer.to_string()].into_iter().chain(numbers).collect()
        })
        .collect();
    table::render(&["transfer: layer", "first loss", "last loss", "ratio"], &rows)
}

/// Reads the data, and says how much there is and how much of it the run will read.
pub(super) fn read_data(
    args: &LinearizeArgs,
    recipe: &Recipe,
    model: &Model,
    cache: &TokenCache,
    printer: &Printer,
) -> anyhow::Result<Windows> {
    let windows = Windows::read(&args.data, &model.tokenizer, &recipe.data, recipe.seed, cache)?;
    let (transfer, finetune) = (&recipe.transfer, &recipe.finetune);
    let end = windows
        .position_after(&[(transfer.steps, transfer.batch), (finetune.steps, finetune.batch)]);
    let epochs = windows.epochs(&end);
    printer.step("Data", format_args!("{}; the run reads {epochs:.2} epochs", windows.summary()));
    Ok(windows)
}

fn export_kind(args: &LinearizeArgs) -> ExportKind {
    match (args.delta, args.dtype) {
        (true, _) => ExportKind::Delta,
        (false, ExportDtype::F32) => ExportKind::Full(DType::F32),
        (false, ExportDtype::Bf16) => ExportKind::Full(DType::BF16),
    }
}
