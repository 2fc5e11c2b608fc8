//! The verdict of a run.

use std::path::Path;
use std::time::Instant;

use still_model::{Model, Student};
use still_train::Recipe;

use super::Verdict;
use super::row::{Row, TEACHER};
use super::samples::greedy;
use super::words::{Quality, advice};
use super::yardstick::{Size, heldout, measure, trial, usual_rows, yardstick};
use crate::printer::Printer;
use crate::progress::Bar;
use crate::shown::in_shell;

/// Seconds that a verdict may take on the machine that trained.
const SECONDS: f64 = 45.0;
/// The same of a run that read fewer tokens than [`QUICK`].
const QUICK_SECONDS: f64 = 20.0;
const QUICK: usize = 250_000;

/// What is judged: a run that is over.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// What was trained on it, budgets resolved.
    pub recipe: &'a Recipe,
    /// Sequences that no step trained on.
    pub heldout: &'a [Vec<u32>],
    /// The result.
    pub student: &'a Model,
    /// Where the student was saved.
    pub out: &'a Path,
    /// The run's directory.
    pub run_dir: &'a Path,
}

/// Measures teacher, untrained and trained student, as much of it as the machine does in less than a minute.
///
/// # Errors
/// An error of a model.
pub fn judge(judged: &Judged<'_>, printer: &Printer) -> anyhow::Result<Verdict> {
    let started = Instant::now();
    let &Judged { recipe, student, .. } = judged;
    let (teacher, config) = (student.teacher(), student.config());
    let untrained = Student::init(
        recipe.attention.resolve(config)?,
        config,
        recipe.attention.init,
        recipe.seed,
    )?;
    let untrained = student.with_student(untrained.to_device(student.device())?);

    let seconds = if tokens(recipe) < QUICK { QUICK_SECONDS } else { SECONDS };
    let bar = Bar::new(printer, "Comparing", "how fast the teacher reads", 0, "");
    let size = Size::fitting(seconds, trial(&teacher)?, config.max_position_embeddings);
    drop(bar);
    let tokens = crate::table::count(size.length);
    printer.step(
        "Comparing",
        format_args!("teacher and student at {tokens} tokens (--no-verdict leaves this out)"),
    );
    let (windows, heldout) = heldout(judged.heldout, &student.tokenizer, size)?;
    let yardstick = yardstick(student, windows, size, recipe.seed)?;
    let recall = [("pass keys", "passkey", size.length)];
    let measured = |name: &str, model: &Model| measure(&yardstick, name, model, printer);
    let of_teacher = measured(TEACHER, &teacher)?;
    let mut rows = vec![Row::of(TEACHER, &of_teacher, None, &recall, recipe.seed)?];
    for (name, model) in [("untrained", &untrained), ("trained", student)] {
        let measured = measured(name, model)?;
        rows.push(Row::of(name, &measured, Some(&of_teacher), &recall, recipe.seed)?);
    }
    let bar = Bar::new(printer, "Comparing", "a short answer of both", 0, "");
    let samples = vec![greedy(TEACHER, &teacher)?, greedy("trained", student)?];
    drop(bar);

    let (first, last) = (&rows[0], &rows[2]);
    let steps = (recipe.transfer.steps, recipe.finetune.steps);
    let mut next = advice(first, Some(&rows[1]), last, steps);
    let (out, run_dir) = (in_shell(judged.out), in_shell(judged.run_dir));
    next.push(format!("talk to it: still chat --model {out}"));
    next.push(format!("look at the run: still report run {run_dir}"));
    Ok(Verdict {
        sentence: Quality::of(first, last).sentence(first, last),
        rows,
        samples,
        next,
        heldout,
        context: size.length,
        cache_rows: usual_rows(student).name().into(),
        teacher_cache_rows: usual_rows(&teacher).name().into(),
        base: student.base.source.clone(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Tokens that a run reads, at most.
fn tokens(recipe: &Recipe) -> usize {
    let longest = recipe.data.lengths.iter().copied().max().unwrap_or(recipe.data.length);
    let (transfer, finetune) = (&recipe.transfer, &recipe.finetune);
    longest * (transfer.steps * transfer.batch + finetune.steps * finetune.batch)
}
