//! Generation, whole and as an iterator.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use still_model::{Cancel, Finish, GenerateOptions, ModelError};

use crate::errors::exception;
use crate::model::Shared;
use crate::state::Lease;
use crate::work::Job;

/// What was generated.
#[pyclass(frozen, get_all, module = "still")]
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text, up to a stop string.
    text: String,
    /// The new token ids, without the one that ends a sequence.
    ids: Vec<u32>,
    /// "end_of_sequence", "stop" or "length".
    finish: &'static str,
    /// Tokens of the prompt.
    prompt_tokens: usize,
    /// Seconds until the first token's logits.
    prefill_seconds: f64,
    /// Seconds after that.
    decode_seconds: f64,
    /// Said where the sequence left the positions that the base was trained for.
    warning: Option<String>,
}

#[pymethods]
impl Generation {
    fn __str__(&self) -> String {
        self.text.clone()
    }

    fn __repr__(&self) -> String {
        format!("<still.Generation of {} tokens, ended by {}>", self.ids.len(), self.finish)
    }
}

/// A generation that is asked for.
pub struct Request {
    shared: Arc<Shared>,
    ids: Vec<u32>,
    lease: Lease,
    options: GenerateOptions,
}

impl Request {
    /// # Errors
    /// Options that there are not, or that are out of range.
    pub fn new(
        py: Python<'_>,
        shared: Arc<Shared>,
        ids: Vec<u32>,
        lease: Lease,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let options = read_options(options)?;
        options.validate().map_err(|error| exception(py, &error.into()))?;
        Ok(Self { shared, ids, lease, options })
    }

    /// Generates all of it.
    ///
    /// # Errors
    /// As [`Job::wait`].
    pub fn generate(self, py: Python<'_>) -> PyResult<Generation> {
        let cancel = self.options.cancel.clone();
        Job::begin(py, cancel, move || self.run(&mut |_| true))?.wait(py)
    }

    /// Generates in the background.
    ///
    /// # Errors
    /// A system that gives no thread.
    pub fn stream(self, py: Python<'_>) -> PyResult<Stream> {
        let (tell, pieces) = channel();
        let cancel = self.options.cancel.clone();
        let job = Job::begin(py, cancel.clone(), move || {
            self.run(&mut |text| tell.send(text.to_owned()).is_ok())
        })?;
        Ok(Stream { cancel, running: Mutex::new(Running { job, pieces, result: None }) })
    }

    /// `on_text` says whether to go on.
    fn run(self, on_text: &mut dyn FnMut(&str) -> bool) -> anyhow::Result<Generation> {
        let Self { shared, ids, mut lease, options } = self;
        let (model, cache) = (&shared.model, &mut lease.cache);
        let mut each = |text: &str| match on_text(text) && !options.cancel.is_raised() {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        };
        let generated = still_model::generate(model, &ids, cache, &options, &mut each)?;
        let finish = match generated.finish {
            Finish::EndOfSequence => "end_of_sequence",
            Finish::StopString => "stop",
            Finish::Length => "length",
            Finish::Interrupted => return Err(ModelError::Cancelled.into()),
        };
        if lease.is_owned() {
            // The last token that was chosen has not been read yet.
            let unread = generated.ids.get(generated.fed..).unwrap_or_default();
            if !unread.is_empty() {
                model.prefill(unread, &mut lease.cache)?;
            }
        }
        lease.commit();
        Ok(Generation {
            text: generated.text,
            ids: generated.ids,
            finish,
            prompt_tokens: ids.len(),
            prefill_seconds: generated.prefill_seconds,
            decode_seconds: generated.decode_seconds,
            warning: generated.warning,
        })
    }
}

fn read_options(given: Option<&Bound<'_, PyDict>>) -> PyResult<GenerateOptions> {
    let mut options = GenerateOptions::default();
    for (name, value) in given.into_iter().flatten() {
        match name.extract::<String>()?.as_str() {
            "max_new_tokens" => options.max_new_tokens = value.extract()?,
            "temperature" => options.temperature = value.extract()?,
            "top_p" => options.top_p = value.extract()?,
            "top_k" => options.top_k = value.extract()?,
            "min_p" => options.min_p = value.extract()?,
            "repetition_penalty" => options.repetition_penalty = value.extract()?,
            "presence_penalty" => options.presence_penalty = value.extract()?,
            "frequency_penalty" => options.frequency_penalty = value.extract()?,
            "seed" => options.seed = value.extract()?,
            "stop" => {
                options.stop = match value.extract::<String>() {
                    Ok(one) => vec![one],
                    Err(_) => value.extract()?,
                }
            }
            other => {
                return Err(PyTypeError::new_err(format!("unexpected keyword argument {other:?}")));
            }
        }
    }
    Ok(options)
}

/// A generation that goes on: an iterator over its text.
#[pyclass(frozen, module = "still")]
pub struct Stream {
    cancel: Cancel,
    running: Mutex<Running>,
}

struct Running {
    job: Job<Generation>,
    pieces: Receiver<String>,
    result: Option<Generation>,
}

/// How often the iterator looks for text.
const PERIOD: Duration = Duration::from_millis(5);

#[pymethods]
impl Stream {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let mut running = self.running.try_lock().map_err(|_| {
            PyTypeError::new_err("the stream is read by another thread at this moment")
        })?;
        loop {
            match running.pieces.try_recv() {
                Ok(text) => return Ok(Some(text)),
                Err(TryRecvError::Disconnected) if running.result.is_some() => return Ok(None),
                Err(_) => {}
            }
            if let Some(outcome) = running.job.look(py, PERIOD)? {
                running.result = Some(outcome?);
            }
        }
    }

    /// The whole generation, once all of it was iterated over.
    #[getter]
    fn result(&self) -> Option<Generation> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).result.clone()
    }

    /// Stops it. A state that it goes on from stays as it was.
    fn close(&self) {
        self.cancel.raise();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancel.raise();
    }
}
