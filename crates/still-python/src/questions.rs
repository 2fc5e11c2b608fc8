//! The questions that a run of `still.torch` asks its student between steps: those of `still linearize`.

use std::path::PathBuf;

use anyhow::anyhow;
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::task::{Generative, Question, Task};
use still_model::{ModelConfig, Tokenizer};

use crate::errors::exception;
use crate::pieces::parsed_recipe;

/// The questions of a recipe's `[evaluation]`, the same at every evaluation of a run.
#[pyclass(frozen, module = "still._still")]
pub struct Questions {
    tokenizer: Tokenizer,
    passkey: Option<Task>,
    repeated: Option<Task>,
}

type Ids<'py> = Bound<'py, PyArray1<i64>>;

fn array<'py>(py: Python<'py>, ids: &[u32]) -> Ids<'py> {
    ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>().into_pyarray(py)
}

impl Questions {
    fn written(&self) -> impl Iterator<Item = &dyn Generative> {
        let items = self.passkey.iter().flat_map(|task| &task.items);
        items.filter_map(|item| match &item.question {
            Question::Generation(question) => Some(&**question as &dyn Generative),
            _ => None,
        })
    }
}

#[pymethods]
impl Questions {
    /// Of a recipe, for a base's configuration (JSON) and the `tokenizer.json` of a directory.
    #[new]
    fn new(py: Python<'_>, config: &str, recipe: &str, tokenizer: PathBuf) -> PyResult<Self> {
        let make = || -> anyhow::Result<Self> {
            let config = ModelConfig::from_hf_json(&serde_json::from_str(config)?)?;
            let recipe = parsed_recipe(recipe)?;
            let tokenizer = Tokenizer::from_hf_dir(&tokenizer)?;
            let task = |task: LongTask, length, items| {
                let options = LongOptions { length, items, seed: recipe.seed, chat: false };
                let files = LongFiles::default();
                let made = || task.build(&tokenizer, config.vocab_size, &files, options);
                (length > 0 && items > 0).then(made).transpose()
            };
            let asked = &recipe.evaluation;
            let passkey = task(LongTask::Passkey, asked.passkey_length, asked.passkey_keys)?;
            let repeated = task(LongTask::RepeatedText, 2 * asked.repeated_text, 1)?;
            Ok(Self { passkey, repeated, tokenizer })
        };
        make().map_err(|error| exception(py, &error))
    }

    /// Texts whose ends are scored: token ids, and the index of the first that is.
    fn repeated<'py>(&self, py: Python<'py>) -> Vec<(Ids<'py>, usize)> {
        let items = self.repeated.iter().flat_map(|task| &task.items);
        let windows = items.filter_map(|item| match &item.question {
            Question::Window(window) => Some((array(py, &window.ids), window.scored_from)),
            _ => None,
        });
        windows.collect()
    }

    /// Questions that are answered in writing: the prompt, a right answer, and how many tokens an answer has at most.
    fn prompts<'py>(&self, py: Python<'py>) -> PyResult<Vec<(Ids<'py>, Ids<'py>, usize)>> {
        let one = |question: &dyn Generative| {
            let target = question.targets().first().map_or("", String::as_str);
            let target = self.tokenizer.encode(target, false);
            let target = target.map_err(|error| exception(py, &anyhow!(error)))?;
            let ids = array(py, question.prompt_ids());
            Ok((ids, array(py, &target), question.max_new_tokens()))
        };
        self.written().map(one).collect()
    }

    /// What an answer to a prompt is worth, 0 to 1.
    fn score(&self, py: Python<'_>, prompt: usize, answer: Vec<u32>) -> PyResult<f64> {
        let question = self.written().nth(prompt);
        let question = question.ok_or_else(|| PyIndexError::new_err("no such prompt"))?;
        let text = self.tokenizer.decode(&answer, true);
        Ok(question.score(&text.map_err(|error| exception(py, &anyhow!(error)))?))
    }
}
