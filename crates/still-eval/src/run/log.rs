//! The log of samples: JSON lines that are appended as answers come, and read back to go on or to compare.
//!
//! A model's first line says which it is: `{"model", "cache_dtype", "probe"}`. Then comes a line for every sample:
//! `{"model", "task", "id", …}`.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use still_attention::RowDtype;
use still_model::Model;

use super::sample::Sample;
use super::{AskOptions, ask, mean, silent};
use crate::error::{EvalError, Result};
use crate::long::random_tokens;
use crate::task::{Metric, Task, id_windows};

/// Random tokens that a model is recognized by: more than a student's window holds.
const PROBE_TOKENS: usize = 256;
/// Probes that differ by less are of one model on another machine, nats.
const PROBE_TOLERANCE: f64 = 1e-3;

/// A model as the log knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoggedModel {
    /// Its name, as given by the user.
    pub model: String,
    /// How its cache stores exact rows.
    pub cache_dtype: String,
    /// Mean negative log-likelihood of fixed random tokens, nats: other weights have another.
    pub probe: f64,
}

impl LoggedModel {
    /// Reads some tokens with the model.
    ///
    /// # Errors
    /// An error of the model.
    pub fn new(name: &str, model: &Model, rows: RowDtype) -> Result<Self> {
        let ids = random_tokens(model.config().vocab_size, PROBE_TOKENS, 0);
        let options = AskOptions { rows, ..AskOptions::default() };
        let asked = ask(model, &id_windows("probe", [ids]), Vec::new(), &options, &silent)?;
        let probe = (mean(&asked.samples, Metric::Perplexity) * 1e6).round() / 1e6;
        Ok(Self { model: name.to_owned(), cache_dtype: format!("{rows:?}").to_lowercase(), probe })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct SampleLine {
    model: String,
    task: String,
    #[serde(flatten)]
    sample: Sample,
}

/// A line that was read back.
#[derive(Debug)]
enum Line {
    Model(LoggedModel),
    Sample(Box<SampleLine>),
}

/// An open log.
#[derive(Debug)]
pub struct SampleLog {
    path: PathBuf,
    file: Mutex<File>,
    /// What was there already, with the lines' numbers.
    old: Vec<(usize, Line)>,
}

impl SampleLog {
    /// Begins a log; there must be no such file yet.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(failed("cannot make", path))?;
        lock(&file, path)?;
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), old: Vec::new() })
    }

    /// Opens a log to continue it, or creates one. A last line that a killed run left incomplete is cut off.
    ///
    /// # Errors
    /// A file that cannot be read or written; a line that is not of a log.
    pub fn resume(path: &Path) -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(failed("cannot open", path))?;
        lock(&file, path)?;
        let text = std::fs::read(path).map_err(failed("cannot read", path))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let old = read_lines(path, &text[..whole])?;
        file.set_len(whole as u64).map_err(failed("cannot shorten", path))?;
        file.seek(SeekFrom::End(0)).map_err(failed("cannot read", path))?;
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), old })
    }

    /// Begins the samples of a model. If the log has samples of a model of that name, it must be the same model.
    ///
    /// # Errors
    /// Another model of that name; a line that cannot be written.
    pub fn begin(&self, model: &LoggedModel) -> Result<()> {
        let known = self.old.iter().find_map(|(line, old)| match old {
            Line::Model(old) if old.model == model.model => Some((*line, old)),
            _ => None,
        });
        let Some((line, old)) = known else { return self.write(model) };
        let reason = if old.cache_dtype != model.cache_dtype {
            format!("{} was asked with a cache in {}", model.model, old.cache_dtype)
        } else if (old.probe - model.probe).abs() > PROBE_TOLERANCE {
            format!("{} had other weights then", model.model)
        } else {
            return Ok(());
        };
        Err(EvalError::Samples { path: self.path.clone(), line, reason })
    }

    /// The model's answers to a task that the log has, judged again.
    ///
    /// # Errors
    /// A sample that answers another question than the task's item.
    pub fn known(&self, model: &str, task: &Task) -> Result<Vec<Sample>> {
        let items: std::collections::HashMap<&str, _> =
            task.items.iter().map(|item| (item.id.as_str(), item)).collect();
        let mut known = Vec::new();
        for (line, old) in &self.old {
            let Line::Sample(old) = old else { continue };
            if old.model != model || old.task != task.name {
                continue;
            }
            // Asked for fewer items than then.
            let Some(item) = items.get(old.sample.id.as_str()) else { continue };
            let sample = old.sample.clone().judged_again(item, &task.metrics);
            known.push(sample.ok_or_else(|| EvalError::Samples {
                path: self.path.clone(),
                line: *line,
                reason: format!("item {} of {} was another question then", item.id, task.name),
            })?);
        }
        Ok(known)
    }

    /// Appends a sample; it is in the file when this returns.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn append(&self, model: &str, task: &str, sample: &Sample) -> Result<()> {
        let (model, task, sample) = (model.to_owned(), task.to_owned(), sample.clone());
        self.write(&SampleLine { model, task, sample })
    }

    fn write(&self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line)
            .map_err(|error| failed("cannot write", &self.path)(std::io::Error::other(error)))?;
        text.push('\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(text.as_bytes()).map_err(failed("cannot write", &self.path))
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> EvalError {
    let path = path.to_path_buf();
    move |source| EvalError::Io { action, path, source }
}

/// One process at a time writes a log. Where a file system has no locks nothing keeps a second one out.
fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(failed("cannot write", path)(std::io::Error::other("another still writes it")))
        }
        _ => Ok(()),
    }
}

fn read_lines(path: &Path, text: &[u8]) -> Result<Vec<(usize, Line)>> {
    let mut lines = Vec::new();
    for (n, text) in text.split(|&byte| byte == b'\n').enumerate() {
        if text.is_empty() {
            continue;
        }
        let read = || -> serde_json::Result<Line> {
            let value: serde_json::Value = serde_json::from_slice(text)?;
            Ok(match value.get("task") {
                Some(_) => Line::Sample(serde_json::from_value(value)?),
                None => Line::Model(serde_json::from_value(value)?),
            })
        };
        let line = read().map_err(|error| EvalError::Samples {
            path: path.to_path_buf(),
            line: n + 1,
            reason: format!("no line of a log of samples: {error}"),
        })?;
        lines.push((n + 1, line));
    }
    Ok(lines)
}
