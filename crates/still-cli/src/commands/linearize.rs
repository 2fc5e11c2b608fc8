//! `still linearize`: both training stages, with checkpoints, then the student.

use std::path::PathBuf;

use candle_core::DType;
use serde_json::json;
use still_model::{ExportKind, Model, save_student};
use still_train::{Recipe, TokenCache, Windows, linearize_windows};

use super::{load, read_text};
use crate::args::{ExportDtype, LinearizeArgs};
use crate::commands::observer::BarObserver;
use crate::errors::user;
use crate::interrupt;
use crate::printer::Printer;

/// Runs the command.
pub fn run(args: &LinearizeArgs, printer: &Printer) -> anyhow::Result<()> {
    if args.out.exists() && !args.overwrite {
        return Err(user(
            format!("{} exists already", args.out.display()),
            "choose another --out, or add --overwrite",
        ));
    }
    for path in &args.data {
        if !path.is_file() {
            return Err(user(
                format!("no file {}", path.display()),
                "give --data files: .txt, .jsonl, .jsonl.zst or .bin",
            ));
        }
    }
    let recipe = match &args.recipe {
        Some(path) => Recipe::parse(&read_text(path)?, &args.set)?,
        None => Recipe::parse("", &args.set)?,
    };
    let model = load(&args.model.model, printer)?;
    if model.student.is_some() {
        return Err(user(
            format!("{} is a student already", args.model.model),
            "linearize the base model that it came from",
        ));
    }
    interrupt::catch()?;
    let run_dir = run_dir(args);
    printer.step("Run", run_dir.display());
    let windows = read_data(&args.data, &recipe, &model, printer)?;
    let mut observer = BarObserver::new(printer);
    let student =
        linearize_windows(&model, &recipe, &windows, &run_dir, args.resume, &mut observer)?;
    observer.finish();
    let kind = match (args.delta, args.dtype) {
        (true, _) => ExportKind::Delta,
        (false, ExportDtype::F32) => ExportKind::Full(DType::F32),
        (false, ExportDtype::Bf16) => ExportKind::Full(DType::BF16),
    };
    save_student(&args.out, &student, kind)?;
    printer.step("Saved", args.out.display());
    printer.note(format_args!("talk to it: still chat --model {}", args.out.display()));
    if args.json {
        printer.json(&json!({
            "out": args.out,
            "run_dir": run_dir,
            "export": if args.delta { "delta" } else { "full" },
            "stages": observer.stages(),
        }))?;
    }
    Ok(())
}

/// Reads the data and says how much there is, and how much of it the run will read.
fn read_data(
    paths: &[PathBuf],
    recipe: &Recipe,
    model: &Model,
    printer: &Printer,
) -> anyhow::Result<Windows> {
    let cache = TokenCache::user()?;
    let windows = Windows::read(paths, &model.tokenizer, &recipe.data, recipe.seed, &cache)?;
    let (transfer, finetune) = (&recipe.transfer, &recipe.finetune);
    let end = windows
        .position_after(&[(transfer.steps, transfer.batch), (finetune.steps, finetune.batch)]);
    let epochs = windows.epochs(&end);
    printer.step("Data", format_args!("{}; the run reads {epochs:.2} epochs", windows.summary()));
    Ok(windows)
}

fn run_dir(args: &LinearizeArgs) -> PathBuf {
    args.run_dir.clone().unwrap_or_else(|| {
        let mut name = args.out.clone().into_os_string();
        name.push(".run");
        name.into()
    })
}
