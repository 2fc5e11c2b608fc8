//! Measurements of the student while a run goes on.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use still_attention::RowDtype;
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::run::{AskOptions, Sample, ask, mean};
use still_eval::task::{Metric, Task, id_windows};
use still_model::Model;
use still_model::files::write_file;

use crate::data::Window;
use crate::error::{Result, TrainError};
use crate::metrics::{Logged, Observer, Stage};
use crate::recipe::EvaluationRecipe;

/// One evaluation: what the recipe asked for, and nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The stage.
    pub stage: Stage,
    /// Steps of the stage done; 0 before its first.
    pub step: usize,
    /// Next-token loss on the held-out windows, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heldout_nll: Option<f64>,
    /// Share of pass keys found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passkey_recall: Option<f64>,
    /// Loss on the second copy of a random sequence, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeated_nll: Option<f64>,
    /// Whether the held-out loss is the run's lowest so far.
    pub best: bool,
    /// Wall-clock seconds that it took.
    pub seconds: f64,
}

impl Logged for Evaluation {
    fn at(&self) -> (Stage, usize) {
        (self.stage, self.step)
    }
}

/// The file in a run's directory that says what the teacher reaches where the student is evaluated.
pub const TEACHER_FILE: &str = "teacher.json";

/// What a model reaches in an evaluation.
#[derive(Serialize)]
struct Reached {
    #[serde(skip_serializing_if = "Option::is_none")]
    heldout_nll: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    passkey_recall: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repeated_nll: Option<f64>,
    seconds: f64,
}

/// What is measured, the same at every evaluation of a run.
#[derive(Debug)]
pub(crate) struct Evaluator {
    heldout: Option<Task>,
    passkey: Option<Task>,
    repeated: Option<Task>,
}

impl Evaluator {
    /// `heldout`: windows that no step trains on, one sequence each; as many are read as the recipe says.
    ///
    /// # Errors
    /// Fewer held-out windows than the recipe asks for; pass keys in too few tokens.
    pub fn new(
        recipe: &EvaluationRecipe,
        heldout: &[Window],
        model: &Model,
        seed: u64,
    ) -> Result<Self> {
        let Some(heldout) = heldout.get(..recipe.windows) else {
            return Err(TrainError::Recipe {
                what: format!(
                    "evaluation.windows is {}, {} held-out windows are there",
                    recipe.windows,
                    heldout.len()
                ),
                hint: "hold out more text, or lower evaluation.windows (0: measure no loss)".into(),
            });
        };
        let long = |task: LongTask, length, items| {
            let options = LongOptions { length, items, seed, chat: false };
            let (tokenizer, vocab_size) = (&model.tokenizer, model.config().vocab_size);
            let made = || task.build(tokenizer, vocab_size, &LongFiles::default(), options);
            (length > 0 && items > 0).then(made).transpose()
        };
        let ids = heldout.iter().map(|window| window.ids().to_vec());
        Ok(Self {
            heldout: (!heldout.is_empty()).then(|| id_windows("heldout", ids)),
            passkey: long(LongTask::Passkey, recipe.passkey_length, recipe.passkey_keys)?,
            repeated: long(LongTask::RepeatedText, 2 * recipe.repeated_text, 1)?,
        })
    }

    /// Items of an evaluation.
    pub fn items(&self) -> usize {
        let tasks = [&self.heldout, &self.passkey, &self.repeated];
        tasks.into_iter().flatten().map(|task| task.items.len()).sum()
    }

    /// Measures a student; `on_item` is called at the end of each item. Whether it is the best, the caller knows.
    ///
    /// # Errors
    /// A likelihood that is not a number; an error of the model.
    pub fn evaluate(
        &self,
        model: &Model,
        stage: Stage,
        step: usize,
        on_item: &(dyn Fn() + Sync),
    ) -> Result<Evaluation> {
        let reached = self.measure(model, on_item)?;
        let Reached { heldout_nll, passkey_recall, repeated_nll, seconds } = reached;
        let best = false;
        Ok(Evaluation { stage, step, heldout_nll, passkey_recall, repeated_nll, best, seconds })
    }

    /// Measures the teacher and writes what it reaches into the run's directory. A run that is resumed has it already.
    ///
    /// # Errors
    /// As [`Evaluator::evaluate`]; a file that cannot be written.
    pub fn measure_teacher(
        &self,
        model: &Model,
        run_dir: &Path,
        resume: bool,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let path = run_dir.join(TEACHER_FILE);
        if resume && path.exists() {
            return Ok(());
        }
        let on_item = observer.on_teacher(self.items());
        let json = serde_json::to_string(&self.measure(&model.teacher(), &on_item)?)
            .map_err(|error| TrainError::write(&path)(std::io::Error::other(error)))?;
        write_file(&path, (json + "\n").as_bytes()).map_err(TrainError::write(&path))
    }

    fn measure(&self, model: &Model, on_item: &(dyn Fn() + Sync)) -> Result<Reached> {
        let started = Instant::now();
        // One item at a time on each thread: a run's memory is for training.
        let options = AskOptions {
            rows: model.cache_rows(RowDtype::F32),
            batch_size: 1,
            ..AskOptions::default()
        };
        let told = |_: &Task, _: &Sample| {
            on_item();
            Ok(())
        };
        let measure = |task: &Option<Task>, metric| -> Result<Option<f64>> {
            let Some(task) = task else { return Ok(None) };
            let asked = ask(model, task, Vec::new(), &options, &told)?;
            Ok(Some(mean(&asked.samples, metric)))
        };
        Ok(Reached {
            heldout_nll: measure(&self.heldout, Metric::Perplexity)?,
            passkey_recall: measure(&self.passkey, Metric::Score)?,
            repeated_nll: measure(&self.repeated, Metric::Perplexity)?,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}
