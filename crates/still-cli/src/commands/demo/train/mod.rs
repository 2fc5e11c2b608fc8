//! `still demo --train`: linearize a small model on this machine, and show the gain of each step.

mod calibration;
mod evaluation;
mod report;
mod text;
mod training;

use std::time::Instant;

use still_attention::StillConfig;
use still_model::{ExportKind, FeatureInit, Model, Student, StudentTarget, save_student_to};

use self::calibration::calibrate;
use self::evaluation::{Bench, Row};
use self::report::{Parts, Report, Setting};
use self::text::{DemoText, EVAL_WINDOW, TRAIN_WINDOW};
use self::training::Trainer;
use super::DemoArgs;
use crate::books;
use crate::commands::CHUNK;
use crate::commands::model::{self, Place};
use crate::errors::user;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::shown::in_shell;
use crate::verdict::samples;

/// Runs the command.
pub fn run(args: &DemoArgs, printer: &Printer) -> anyhow::Result<()> {
    args.check()?;
    let out = args.out.as_deref().map(StudentTarget::claim).transpose()?;
    let started = Instant::now();
    let mut parts = Parts::default();
    let teacher = timed(&mut parts.load, || load(args, printer))?;
    let bar = Bar::new(printer, "Reading", "the books", 0, "");
    let text = DemoText::new(&teacher.tokenizer, args.seed)?;
    let heldout = text::heldout(&teacher.tokenizer, args.windows())?;
    drop(bar);
    introduce(args, &text, printer);
    let bench = Bench::new(args, heldout, &teacher)?;
    let mut rows: Vec<Row> = Vec::with_capacity(5);
    let mut measure = |name, model: &Model, parts: &mut Parts| -> anyhow::Result<()> {
        let row = timed(&mut parts.evaluation, || bench.measure(name, model, printer))?;
        rows.push(row);
        Ok(())
    };

    let config = &teacher.decoder.config;
    let (layers, geometry) = (config.num_hidden_layers, config.geometry());
    let student = |still| Student::init(still, config, FeatureInit::Identity, args.seed);
    let calibrated =
        timed(&mut parts.calibration, || calibrate(&teacher, &text, args.seed, printer))?;
    let untrained = student(calibrated)?;
    measure("teacher", &teacher, &mut parts)?;
    measure("untrained", &teacher.with_student(untrained.clone()), &mut parts)?;

    let mut trainer = Trainer::new(&teacher, &text, args.seed, printer);
    let (n1, n2) = (args.transfer_steps, args.finetune_steps);
    let stage1 = timed(&mut parts.stage1, || trainer.transfer(untrained, 0..n1))?;
    measure("stage1", &teacher.with_student(stage1.clone()), &mut parts)?;
    let stage2 = timed(&mut parts.stage2, || trainer.finetune("stage 2", stage1, n1..n1 + n2))?;
    let stage2 = teacher.with_student(stage2);
    measure("stage2", &stage2, &mut parts)?;

    if args.full {
        let window_only = config.fit_still(StillConfig::window_only(layers, geometry, CHUNK));
        let window_only = student(window_only)?;
        let window_only = timed(&mut parts.window_only, || {
            trainer.finetune("window only", window_only, 0..n1 + n2)
        })?;
        measure("window_only", &teacher.with_student(window_only), &mut parts)?;
    }

    let bar = Bar::new(printer, "Generating", "samples", 0, "");
    let samples = timed(&mut parts.samples, || {
        let mut all = samples("teacher", &teacher, args.seed)?;
        all.extend(samples("stage2", &stage2, args.seed)?);
        anyhow::Ok(all)
    })?;
    drop(bar);
    if let Some(out) = &out {
        save_student_to(out, &stage2, ExportKind::Delta)?;
        printer.step(
            "Saved",
            format_args!("{} (still chat --model {})", out.dir().display(), in_shell(out.dir())),
        );
    }
    let report = Report::new(
        rows,
        samples,
        started.elapsed().as_secs_f64(),
        parts,
        setting(args, &teacher),
    )?;
    if args.json { printer.json(&report) } else { Ok(printer.result(report.render())?) }
}

/// Says what is trained on, and what is measured on.
fn introduce(args: &DemoArgs, text: &DemoText, printer: &Printer) {
    printer.step(
        "Training on",
        format_args!(
            "{} ({} windows of {TRAIN_WINDOW} tokens)",
            books::TRAINING.title,
            text.train.len()
        ),
    );
    printer.step(
        "Held out",
        format_args!(
            "{} ({} windows of {EVAL_WINDOW} tokens)",
            books::HELDOUT.title,
            args.windows()
        ),
    );
}

/// What the numbers of the report are of.
fn setting(args: &DemoArgs, teacher: &Model) -> Setting {
    Setting {
        version: env!("CARGO_PKG_VERSION"),
        base: teacher.base.source.clone(),
        device: "cpu",
        threads: rayon::current_num_threads(),
        dtype: "f32",
        cache_rows: "bf16",
        stage1_tokens: args.transfer_steps * TRAIN_WINDOW,
        stage2_tokens: args.finetune_steps * TRAIN_WINDOW,
        heldout_tokens: args.windows() * EVAL_WINDOW,
        seed: args.seed,
    }
}

fn load(args: &DemoArgs, printer: &Printer) -> anyhow::Result<Model> {
    let model = match &args.model {
        Some(model) => model::load(model, &Place::cpu(), printer)?,
        None => {
            let path = model::fetch_demo(printer)?;
            model::load(&path.to_string_lossy(), &Place::cpu(), printer)?
        }
    };
    if model.student.is_some() {
        return Err(user(
            "the demo needs a teacher to train a student of, and this model is a student already",
            "name the base model, or leave --train out",
        ));
    }
    Ok(model)
}

/// Runs `body` and adds its wall-clock seconds.
fn timed<T, E>(seconds: &mut f64, body: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let started = Instant::now();
    let result = body();
    *seconds += started.elapsed().as_secs_f64();
    result
}
