//! `still linearize`: both training stages, with checkpoints, then the student.

mod args;
mod dry_run;
mod observer;
mod places;
mod training_free;

use std::path::{Path, PathBuf};

use serde_json::json;
use still_model::{Model, save_student_to};
use still_train::{Recipe, TokenCache, Windows, calibrated_recipe, linearize_in};

pub use self::args::LinearizeArgs;
use self::args::Settings;
use self::observer::RunObserver;
use self::places::Places;
use crate::interrupt;
use crate::plot::number;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::provenance::Provenance;
use crate::run_log::{LayerLoss, RunLog};
use crate::shown::in_shell;
use crate::table;
use crate::verdict::{Judged, Verdict, judge};

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let inputs = &settings.inputs;
    let load = || settings.load(printer);
    if let Some(recipe) = inputs.usual {
        let what = format_args!(
            "{}, the usual one for {}; still recipes list names others",
            recipe.name, inputs.place.name
        );
        printer.step("Recipe", what);
    }
    if settings.dry_run {
        let model = load()?;
        return match settings.training_free {
            true => training_free::plan(settings, &model, printer),
            false => dry_run::run(settings, &model, printer),
        };
    }
    interrupt::hint("nothing was trained in this start: the same command begins it again");
    let places = Places::claim(settings)?;
    let model = load()?;
    places.check_room(&model, &inputs.recipe, settings.kind)?;
    let run_dir = places.run_dir.path();
    printer.step("Run", run_dir.display());
    Verdict::remove(run_dir)?;
    Provenance::now(&inputs.model, &inputs.place.name).record(run_dir, settings.resume)?;
    let mut observer = RunObserver::new(printer, run_dir, settings.tensorboard);
    let cache = TokenCache::user()?;
    if settings.training_free {
        return training_free::run(settings, &model, &places, &cache, observer, printer);
    }
    if inputs.recipe.calibration.cache_fraction.is_some() {
        observer.calibrating();
    }
    let recipe =
        calibrated_recipe(&model, &inputs.recipe, &inputs.data, &cache, run_dir, &mut observer)?;
    observer.preparing();
    let windows = read_data(&inputs.data, &recipe, &model, &cache, printer)?;
    let student =
        linearize_in(&model, &recipe, &windows, &places.run_dir, settings.resume, &mut observer)?;
    observer.finish();
    interrupt::hint("the run is whole: the same command with --resume writes the student");
    let layers = transfer_layers(&observer, run_dir, printer);
    if !layers.is_empty() {
        printer.table(&layer_table(&layers));
        printer.note("both losses on the windows of the first step");
    }
    let bar = Bar::new(printer, "Saving", "the student", 0, "");
    save_student_to(&places.student, &student, settings.kind)?;
    drop(bar);
    printer.step("Saved", settings.out.display());
    let verdict = verdict(settings, &student, &recipe, &windows, run_dir, printer);
    if verdict.is_none() {
        printer.note(format_args!("look at the run: still report run {}", in_shell(run_dir)));
        printer.note(format_args!("talk to it: still chat --model {}", in_shell(&settings.out)));
    }
    if settings.json {
        printer.json(&json!({
            "out": settings.out.display().to_string(),
            "run_dir": run_dir.display().to_string(),
            "export": if settings.kind.is_delta() { "delta" } else { "full" },
            "stages": observer.stages(),
            "layers": layers,
            "verdict": verdict,
        }))?;
    }
    Ok(())
}

/// Compares the saved student with its teacher. The run is whole without it: what goes wrong is told, and that is all.
fn verdict(
    settings: &Settings,
    student: &Model,
    recipe: &Recipe,
    windows: &Windows,
    run_dir: &Path,
    printer: &Printer,
) -> Option<Verdict> {
    if !settings.verdict {
        return None;
    }
    interrupt::hint(format!(
        "the student is saved, and only its verdict is missing: still chat --model {}",
        in_shell(&settings.out)
    ));
    let heldout: Vec<Vec<u32>> =
        windows.heldout().iter().map(|window| window.ids().to_vec()).collect();
    let judged = Judged { recipe, heldout: &heldout, student, out: &settings.out, run_dir };
    let made = judge(&judged, printer).and_then(|verdict| {
        verdict.write(run_dir)?;
        Ok(verdict)
    });
    match made {
        Ok(verdict) => {
            printer.table(&format!("\n{}\n", verdict.render()));
            Some(verdict)
        }
        Err(error) => {
            printer.warn(format_args!("there is no verdict on the student: {error:#}"));
            None
        }
    }
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
    let bar = Bar::new(printer, "Reading", "the data", 0, "");
    let windows = Windows::read(data, &model.tokenizer, &recipe.data, recipe.seed, cache)?;
    drop(bar);
    let (transfer, finetune) = (&recipe.transfer, &recipe.finetune);
    let end = windows
        .position_after(&[(transfer.steps, transfer.batch), (finetune.steps, finetune.batch)]);
    let epochs = windows.epochs(&end);
    printer.step("Data", windows.summary());
    printer.step("Plan", format_args!("to read {epochs:.2} epochs of it"));
    Ok(windows)
}
