//! `still eval`: benchmarks of one model, or of several to compare.

mod ablated;
mod args;
mod branches;
mod compressed;
mod efficiency;
pub mod plan;
mod results;

use std::path::{Path, PathBuf};

use serde_json::Value;
use still_attention::{BranchShares, RowDtype};
use still_eval::BenchPoint;
use still_eval::compress::Compression;
use still_eval::long::LongFiles;
use still_eval::run::{
    AskOptions, Asked, Listener, LoggedModel, Sample, SampleLog, TaskScores, ask,
};
use still_eval::task::{Metric, Task};

use self::ablated::{LeftOut, Subject, ablated};
pub use self::args::EvalArgs;
use self::args::Settings;
use self::compressed::compressed;
use self::plan::Plan;
use super::model::load;
use crate::errors::user;
use crate::interrupt::{self, OnSignal};
use crate::outputs::{Existing, OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

/// A model's answers.
struct Evaluated {
    model: String,
    /// The recipe of a student, as it was resolved.
    recipe: Option<Value>,
    /// Whether it is a student, and the base that it is of.
    student: bool,
    base: String,
    /// What was changed, of a variant: `router: random`.
    ablation: Option<String>,
    /// How its cache was compressed, if it was.
    compression: Option<Compression>,
    /// How its cache stored exact rows.
    rows: RowDtype,
    tasks: Vec<Answered>,
    /// By length, of `--efficiency`.
    efficiency: Vec<BenchPoint>,
}

/// A task's answers.
struct Answered {
    metrics: Vec<Metric>,
    samples: Vec<Sample>,
    scores: TaskScores,
    /// Tokens read for answers that were not known, and the seconds that took.
    read: (usize, f64),
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    check_outputs(settings)?;
    let plans = Plan::of(&settings.tasks, &settings.questions)?;
    let log = open_log(settings)?;
    interrupt::hint(resume_hint(settings));
    interrupt::on_signal(OnSignal::Finish);
    let asked = ask_models(settings, &plans, log.as_ref(), printer)?;
    report(&asked, settings, printer)?;
    match asked.cut_short {
        None => Ok(()),
        Some(place) => Err(user(
            format!("interrupted {place}; the table has what was finished"),
            resume_hint(settings),
        )),
    }
}

fn resume_hint(settings: &Settings) -> String {
    match &settings.samples {
        Some(path) => format!("add --resume to go on from {}", path.display()),
        None => "with --samples and --resume a run can be gone on with".into(),
    }
}

/// What all models answered.
#[derive(Default)]
struct AllAnswers {
    evaluated: Vec<Evaluated>,
    /// Of `--branches`.
    carried: Option<Vec<Vec<BranchShares>>>,
    skipped: Vec<LeftOut>,
    /// Where a signal ended it.
    cut_short: Option<String>,
}

/// Asks every model and its variants, one model in memory at a time.
fn ask_models(
    settings: &Settings,
    plans: &[Plan],
    log: Option<&SampleLog>,
    printer: &Printer,
) -> anyhow::Result<AllAnswers> {
    let mut all = AllAnswers::default();
    let mut any_dense = false;
    for (n, name) in settings.models.iter().enumerate() {
        let model = load(name, &settings.place, printer)?;
        any_dense |= model.student.is_none();
        let mut subjects = vec![Subject::unchanged(name, model)];
        if n == 0 {
            if let Some(text) = &settings.branches {
                all.carried = Some(branches::measure(&subjects[0].model, text, printer)?);
            }
            let (variants, left_out) = ablated(name, &subjects[0].model, &settings.factors)?;
            for LeftOut { ablation, why } in &left_out {
                printer.step("Skipped", format_args!("{ablation}: {why}"));
            }
            subjects.extend(variants);
            all.skipped = left_out;
        }
        if n + 1 == settings.models.len() && !any_dense && !settings.compressions.is_empty() {
            return Err(user(
                "--compress is of dense models, and only students are asked",
                "name their base with --model or --compare",
            ));
        }
        subjects.extend(compressed(&subjects[0], &settings.compressions));
        for subject in subjects {
            let (mut answers, cut) = evaluate(&subject, plans, settings, log, printer)?;
            let Subject { name, ablation, compression, model } = subject;
            answers.ablation = ablation;
            // A compressed cache is made to be compared by what it holds, not by its speed.
            if cut.is_none() && !settings.efficiency.is_empty() && compression.is_none() {
                answers.efficiency = efficiency::measure(
                    &name,
                    &model,
                    answers.rows,
                    &settings.efficiency,
                    printer,
                )?;
            }
            all.evaluated.push(answers);
            if cut.is_some() {
                all.cut_short = cut;
                return Ok(all);
            }
        }
    }
    Ok(all)
}

/// Writes and prints the results.
fn report(asked: &AllAnswers, settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let AllAnswers { evaluated, carried, skipped, cut_short } = asked;
    let bar = Bar::new(printer, "Comparing", "models, with intervals", 0, "");
    let compared = evaluated.iter().any(|model| !model.tasks.is_empty());
    let table = compared.then(|| results::render(evaluated, settings.seed)).transpose()?;
    // Before the tables: whoever reads them may go away.
    if cut_short.is_none() {
        let all = results::to_json(evaluated, carried.as_deref(), skipped, settings)?;
        if let Some(path) = &settings.out {
            results::write(path, &all)?;
            printer.step("Saved", path.display());
        }
        if settings.json {
            drop(bar);
            return printer.json(&all);
        }
    }
    drop(bar);
    if let Some(table) = table {
        printer.result(table)?;
    }
    if evaluated.iter().any(|model| !model.efficiency.is_empty()) {
        printer.result(efficiency::render(evaluated))?;
    }
    if let Some(carried) = carried {
        printer.result(branches::render(carried))?;
    }
    Ok(())
}

/// Every file that is written can be, and is none that is read.
fn check_outputs(settings: &Settings) -> anyhow::Result<()> {
    let mut outputs = Outputs::default();
    let models = settings.models.iter().map(Path::new);
    let LongFiles { text, squad, hotpotqa, .. } = &settings.questions.files;
    let files = text.iter().chain(squad).chain(hotpotqa).map(PathBuf::as_path);
    outputs.spare(models.chain(files))?;
    if let Some(path) = &settings.out {
        outputs.file("--out", path, OutputKind::Results, Existing::Replace)?;
    }
    if let Some(path) = &settings.samples {
        outputs.place("--samples", path)?;
    }
    Ok(())
}

fn open_log(settings: &Settings) -> anyhow::Result<Option<SampleLog>> {
    let Some(path) = &settings.samples else { return Ok(None) };
    if settings.resume {
        return Ok(Some(SampleLog::resume(path)?));
    }
    if path.exists() {
        return Err(user(
            format!("{} exists already", path.display()),
            "add --resume to go on with it, or name another file",
        ));
    }
    Ok(Some(SampleLog::create(path)?))
}

/// Asks one model every task; also where it was interrupted, if it was.
fn evaluate(
    subject: &Subject,
    plans: &[Plan],
    settings: &Settings,
    log: Option<&SampleLog>,
    printer: &Printer,
) -> anyhow::Result<(Evaluated, Option<String>)> {
    let Subject { name, model, compression, .. } = subject;
    let rows = settings.rows.told(model, printer);
    if let Some(log) = log {
        log.begin(&LoggedModel::new(name, model, rows)?)?;
    }
    let recipe = model.student.as_ref().and_then(|student| student.recipe.clone());
    let mut evaluated = Evaluated {
        model: name.clone(),
        recipe,
        student: model.student.is_some(),
        base: model.base.source.clone(),
        ablation: None,
        compression: *compression,
        rows,
        tasks: Vec::new(),
        efficiency: Vec::new(),
    };
    let options = AskOptions { rows, batch_size: settings.batch_size, compression: *compression };
    for plan in plans {
        let made;
        let task = match plan {
            Plan::Ready(task) => task,
            Plan::Made(make) => {
                let _bar = Bar::new(printer, "Preparing", "questions", 0, "");
                made = make(model)?;
                &made
            }
        };
        let known = log.map_or(Ok(Vec::new()), |log| log.known(name, task))?;
        let bar = Bar::new(printer, "Asking", &task.name, task.items.len(), "items");
        bar.done_before(known.len());
        let listener = EvalProgress { bar: &bar, model: name, log };
        let asked = ask(model, task, known, &options, &listener)?;
        if !asked.complete {
            let place = format!(
                "after {} of {} items of {}",
                asked.samples.len(),
                task.items.len(),
                task.name
            );
            return Ok((evaluated, Some(place)));
        }
        let scores = TaskScores::of(task, &asked.samples)?;
        bar.done(summary(task, &scores, &asked));
        if scores.truncated > 0 {
            printer.warn(format_args!(
                "{}: {} items are longer than the model reads and lost their beginning",
                task.name, scores.truncated
            ));
        }
        let Asked { samples, tokens, seconds, .. } = asked;
        let (metrics, read) = (task.metrics.clone(), (tokens, seconds));
        evaluated.tasks.push(Answered { metrics, samples, scores, read });
    }
    Ok((evaluated, None))
}

fn summary(task: &Task, scores: &TaskScores, asked: &Asked) -> String {
    let first = scores.metrics.first();
    let value = first.map_or(String::new(), |(metric, estimate)| {
        format!(": {} {}", metric.name(), results::value(*metric, estimate.value))
    });
    let read = match asked.tokens {
        0 => "all known".into(),
        tokens => {
            let speed = tokens as f64 / asked.seconds.max(1e-9);
            format!("{} tokens read at {speed:.0}/s", table::count(tokens))
        }
    };
    format!("{}{value}, {} items, {read}", task.name, scores.n)
}

/// Moves the bar and keeps the samples.
struct EvalProgress<'a> {
    bar: &'a Bar,
    model: &'a str,
    log: Option<&'a SampleLog>,
}

impl Listener for EvalProgress<'_> {
    fn answered(&self, task: &Task, sample: &Sample) -> still_eval::Result<()> {
        if let Some(log) = self.log {
            log.append(self.model, &task.name, sample)?;
        }
        self.bar.advance(1);
        Ok(())
    }

    fn stop(&self) -> bool {
        interrupt::raised()
    }
}
