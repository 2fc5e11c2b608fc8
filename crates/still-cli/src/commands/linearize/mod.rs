//! `still linearize`: both training stages, with checkpoints, then the student.

mod args;
mod dry_run;
mod observer;
mod places;

use std::path::{Path, PathBuf};

use serde_json::json;
use still_model::{ExportKind, Model, save_student_to};
use still_train::{Recipe, TokenCache, Windows, calibrated_recipe, linearize_in};

pub use self::args::LinearizeArgs;
use self::args::Settings;
use self::observer::RunObserver;
use self::places::Places;
use crate::interrupt;
use crate::plot::number;
use crate::printer::Printer;
use crate::run_log::{LayerLoss, RunLog};
use crate::table;

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let inputs = &settings.inputs;
    let load = || inputs.load("linearize", printer);
    if settings.dry_run {
        return dry_run::run(settings, &load()?, printer);
    }
    interrupt::hint("nothing was trained in this start: the same command begins it again");
    let places = Places::claim(settings)?;
    let model = load()?;
    places.check_room(&model, &inputs.recipe, settings.kind)?;
    let run_dir = places.run_dir.path();
    printer.step("Run", run_dir.display());
    let mut observer = RunObserver::new(printer, run_dir, settings.tensorboard);
    let cache = TokenCache::user()?;
    let recipe =
        calibrated_recipe(&model, &inputs.recipe, &inputs.data, &cache, run_dir, &mut observer)?;
    let windows = read_data(&inputs.data, &recipe, &model, &cache, printer)?;
    let student =
        linearize_in(&model, &recipe, &windows, &places.run_dir, settings.resume, &mut observer)?;
    observer.finish();
    interrupt::hint("the run is whole: the same command with --resume writes the student");
    let layers = transfer_layers(&observer, run_dir, printer);
    if !layers.is_empty() {
        printer.table(&layer_table(&layers));
    }
    save_student_to(&places.student, &student, settings.kind)?;
    printer.step("Saved", settings.out.display());
    printer.note(format_args!("look at the run: still report run {}", run_dir.display()));
    printer.note(format_args!("talk to it: still chat --model {}", settings.out.display()));
    if settings.json {
        printer.json(&json!({
            "out": settings.out.display().to_string(),
            "run_dir": run_dir.display().to_string(),
            "export": if settings.kind == ExportKind::Delta { "delta" } else { "full" },
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
    data: &[PathBuf],
    recipe: &Recipe,
    model: &Model,
    cache: &TokenCache,
    printer: &Printer,
) -> anyhow::Result<Windows> {
    let windows = Windows::read(data, &model.tokenizer, &recipe.data, recipe.seed, cache)?;
    let (transfer, finetune) = (&recipe.transfer, &recipe.finetune);
    let end = windows
        .position_after(&[(transfer.steps, transfer.batch), (finetune.steps, finetune.batch)]);
    let epochs = windows.epochs(&end);
    printer.step("Data", format_args!("{}; the run reads {epochs:.2} epochs", windows.summary()));
    Ok(windows)
}
