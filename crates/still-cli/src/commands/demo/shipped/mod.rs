//! `still demo` without `--train`: a student compared with its teacher in a minute or two.
//!
//! Each model reads one document. The reading is timed, and what is asked afterwards goes on from it.

mod document;
mod report;

use std::time::Instant;

use still_eval::Yardstick;
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_model::Model;

use self::document::{FACTS, OPEN, document};
use self::report::{Report, Setting};
use super::DemoArgs;
use crate::commands::model::{self, Place};
use crate::errors::user;
use crate::printer::Printer;
use crate::verdict::{Row, TEACHER, book_windows, measure, usual_rows};

/// Decode steps that are timed after the document.
const DECODE_STEPS: usize = 32;
/// Tokens of a held-out window and of a pass-key prompt, with `--full`.
const FULL_LENGTH: usize = 4096;
/// Held-out windows with `--full`.
const FULL_WINDOWS: usize = 2;
/// Pass keys with `--full`.
const FULL_KEYS: usize = 2;
const STUDENT: &str = "student";

/// Compares the student `name` with its teacher.
///
/// # Errors
/// A model that is no delta student; an error of a model.
pub fn run(args: &DemoArgs, name: &str, printer: &Printer) -> anyhow::Result<()> {
    let started = Instant::now();
    let student = load(name, printer)?;
    let teacher = student.teacher();
    let yardstick = yardstick(args, &student)?;
    let context = yardstick.document.as_ref().map_or(0, |document| document.ids.len());
    let of_teacher = measure(&yardstick, TEACHER, &teacher, printer)?;
    let of_student = measure(&yardstick, STUDENT, &student, printer)?;

    let passkey = LongTask::Passkey.name();
    let recall = [("planted facts", FACTS, context), ("pass keys", passkey, FULL_LENGTH)];
    let rows = [
        Row::of(TEACHER, &of_teacher, None, &recall, args.seed)?,
        Row::of(STUDENT, &of_student, Some(&of_teacher), &recall, args.seed)?,
    ];
    let setting = Setting {
        version: env!("CARGO_PKG_VERSION"),
        student: name.to_owned(),
        base: teacher.base.source.clone(),
        device: "cpu",
        threads: rayon::current_num_threads(),
        cache_rows: usual_rows(&student).name(),
        teacher_cache_rows: usual_rows(&teacher).name(),
        context,
        seed: args.seed,
    };
    let answers = |task| report::answers(task, of_teacher.samples(task), of_student.samples(task));
    let seconds = started.elapsed().as_secs_f64();
    let report = Report::new(rows, answers(FACTS)?, answers(OPEN)?, setting, seconds);
    if args.json { printer.json(&report) } else { Ok(printer.result(report.render())?) }
}

fn load(name: &str, printer: &Printer) -> anyhow::Result<Model> {
    let model = model::load(name, &Place::cpu(), printer)?;
    if model.student.is_none() {
        return Err(user(
            format!("{name} is not a student"),
            "name a student, or add --train to make one of it",
        ));
    }
    // A student with all its weights has its training merged into them: they are not its teacher's.
    if model.base.source == name {
        return Err(user(
            format!(
                "{name} has no teacher with it: its low-rank updates are merged into its weights"
            ),
            "name a student that was saved with --delta, or compare two models with `still eval --compare`",
        ));
    }
    Ok(model)
}

fn yardstick(args: &DemoArgs, model: &Model) -> anyhow::Result<Yardstick> {
    let mut tasks = Vec::new();
    if args.full {
        tasks.push(book_windows(&model.tokenizer, FULL_LENGTH, FULL_WINDOWS)?);
        let (length, items, seed) = (FULL_LENGTH, FULL_KEYS, args.seed);
        let options = LongOptions { length, items, seed, chat: false };
        let (vocab_size, files) = (model.config().vocab_size, LongFiles::default());
        tasks.push(LongTask::Passkey.build(&model.tokenizer, vocab_size, &files, options)?);
    }
    Ok(Yardstick {
        document: Some(document(&model.tokenizer)?),
        tasks,
        contexts: Vec::new(),
        decode_steps: DECODE_STEPS,
    })
}
