//! Pass keys that an untrained student finds at each share of the dense cache.

use serde::Serialize;
use still_attention::RowDtype;
use still_eval::EvalError;
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::run::{AskOptions, Sample, ask};
use still_eval::task::{Metric, Task};
use still_model::{Model, Student};
use still_train::{AttentionRecipe, Calibration};

use crate::printer::Printer;
use crate::progress::Bar;

/// Tokens of a prompt and its answer.
const LENGTH: usize = 1024;

/// What was found at every share that is looked at, with the rows that the budgets are for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PassKeys {
    /// Tokens of a prompt and its answer.
    pub length: usize,
    /// Keys that each model was asked for.
    pub keys: usize,
    /// Those that the teacher finds.
    pub teacher: usize,
    /// By rising share.
    pub points: Vec<Found>,
}

/// What one share finds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Of the dense cache.
    pub cache_fraction: f64,
    /// Keys.
    pub found: usize,
}

impl PassKeys {
    /// What a share finds, if it was asked.
    pub fn at(&self, cache_fraction: f64) -> Option<usize> {
        let at = |point: &&Found| point.cache_fraction == cache_fraction;
        self.points.iter().find(at).map(|point| point.found)
    }
}

/// Asks the teacher and an untrained student of every share for `keys`. Nothing if a model's context holds no prompt, or no keys
/// are asked for.
///
/// # Errors
/// An error of the model.
pub fn measure(
    model: &Model,
    recipe: &AttentionRecipe,
    found: &Calibration,
    keys: usize,
    seed: u64,
    printer: &Printer,
) -> anyhow::Result<Option<PassKeys>> {
    let Some(outlook) = found.own_outlook().filter(|_| keys > 0) else { return Ok(None) };
    let length = LENGTH.min(model.config().max_position_embeddings);
    let options = LongOptions { length, items: keys, seed, chat: false };
    let (tokenizer, vocab_size) = (&model.tokenizer, model.config().vocab_size);
    let task = match LongTask::Passkey.build(tokenizer, vocab_size, &LongFiles::default(), options)
    {
        Err(EvalError::TooShort { .. }) => return Ok(None),
        built => built?,
    };
    let models = outlook.points.len() + 1;
    let bar = Bar::new(printer, "Calibrating", "pass keys", models * keys, "keys");
    let teacher = right(&model.teacher(), &task, &bar)?;
    let mut points: Vec<Found> = Vec::new();
    let mut last: Option<(&[usize], usize)> = None;
    for outcome in &outlook.points {
        let found = match last {
            // Another share may buy nothing more.
            Some((budgets, found)) if budgets == outcome.budgets => {
                bar.advance(keys);
                found
            }
            _ => {
                let plain = recipe.without_calibration();
                let attention = found.budgets_at(outlook.rows, outcome).apply(&plain)?;
                let config = attention.resolve(model.config())?;
                let student = Student::init(config, model.config(), attention.init, seed)?;
                let student = model.with_student(student.to_device(model.device())?);
                right(&student, &task, &bar)?
            }
        };
        last = Some((&outcome.budgets, found));
        points.push(Found { cache_fraction: outcome.cache_fraction, found });
    }
    bar.done(format_args!("pass keys of {length} tokens: {keys} asked at {} shares", points.len()));
    Ok(Some(PassKeys { length, keys, teacher, points }))
}

/// How many keys a model finds.
fn right(model: &Model, task: &Task, bar: &Bar) -> anyhow::Result<usize> {
    let options = AskOptions {
        rows: model.cache_rows(RowDtype::Bf16),
        batch_size: 1,
        ..AskOptions::default()
    };
    let told = |_: &Task, _: &Sample| {
        bar.advance(1);
        Ok(())
    };
    let asked = ask(model, task, Vec::new(), &options, &told)?;
    let right =
        asked.samples.iter().filter(|sample| sample.scores.get(&Metric::Score) == Some(&1.0));
    Ok(right.count())
}
