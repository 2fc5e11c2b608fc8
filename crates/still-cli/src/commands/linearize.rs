//! `still linearize`: both training stages, with checkpoints, then the student.

use std::path::PathBuf;

use candle_core::DType;
use serde_json::json;
use still_model::{ExportKind, save_student};
use still_train::{Recipe, linearize};

use super::{dry_run, load, read_text};
use crate::args::{ExportDtype, LinearizeArgs};
use crate::commands::observer::BarObserver;
use crate::errors::user;
use crate::interrupt;
use crate::printer::Printer;

/// Runs the command.
pub fn run(args: &LinearizeArgs, printer: &Printer) -> anyhow::Result<()> {
    if args.out.exists() && !args.overwrite && !args.dry_run {
        return Err(user(
            format!("{} exists already", args.out.display()),
            "choose another --out, or add --overwrite",
        ));
    }
    for path in &args.data {
        if !path.is_file() {
            return Err(user(
                format!("no file {}", path.display()),
                "give --data text files: .txt, .jsonl or .jsonl.zst",
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
    if args.dry_run {
        return dry_run::run(args, &recipe, &model, printer);
    }
    interrupt::catch()?;
    let run_dir = run_dir(args);
    printer.step("Run", run_dir.display());
    let mut observer = BarObserver::new(printer);
    let student = linearize(&model, &recipe, &args.data, &run_dir, args.resume, &mut observer)?;
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

fn run_dir(args: &LinearizeArgs) -> PathBuf {
    args.run_dir.clone().unwrap_or_else(|| {
        let mut name = args.out.clone().into_os_string();
        name.push(".run");
        name.into()
    })
}
