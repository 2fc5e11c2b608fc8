//! Models.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, anyhow};
use candle_core::DType;
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use still_attention::RowDtype;
use still_model::{
    Cancel, ExportKind, Message, ModelError, OnRead, WeightFormat, fetch, is_built_in, usual_dtype,
};

use crate::arguments::{Tokens, one_of, to_python};
use crate::errors::{exception, input};
use crate::generate::{Generation, Request, Stream};
use crate::state::{Lease, State};
use crate::work::work;

/// Dtypes that models compute in; bf16 on CUDA alone.
const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// A model, and what its states are tied to.
#[derive(Debug)]
pub struct Shared {
    pub model: still_model::Model,
    identity: OnceLock<String>,
}

impl Shared {
    /// [`still_model::Model::state_identity`], computed once.
    pub fn identity(&self) -> anyhow::Result<&str> {
        if let Some(known) = self.identity.get() {
            return Ok(known);
        }
        let identity = self.model.state_identity()?;
        Ok(self.identity.get_or_init(|| identity))
    }
}

/// A model: a base, or a student.
#[pyclass(frozen, module = "still")]
#[derive(Debug)]
pub struct Model {
    pub shared: Arc<Shared>,
    name: String,
}

impl Model {
    pub fn new(model: still_model::Model, name: String) -> Self {
        Self { shared: Arc::new(Shared { model, identity: OnceLock::new() }), name }
    }

    fn inner(&self) -> &still_model::Model {
        &self.shared.model
    }

    /// How a new state stores exact rows.
    fn rows(&self, py: Python<'_>, asked: Option<&str>) -> PyResult<RowDtype> {
        match asked {
            Some(name) => one_of(py, "rows", name, &RowDtype::ALL, RowDtype::name),
            None => Ok(self.inner().cache_rows(RowDtype::Bf16)),
        }
    }

    /// A copy of a state's cache, which must be of this model; or an empty one.
    fn lease(&self, py: Python<'_>, state: Option<&State>) -> PyResult<Lease> {
        match state {
            Some(state) if Arc::ptr_eq(&state.shared, &self.shared) => state.lease(py),
            Some(_) => Err(input(
                py,
                "the state is of another model",
                "make it with this model's new_state or restore",
            )),
            None => {
                let rows = self.rows(py, None)?;
                let cache = self.inner().new_cache(1, rows);
                cache.map(Lease::unowned).map_err(|error| exception(py, &error.into()))
            }
        }
    }

    fn request(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        state: Option<&State>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Request> {
        let lease = self.lease(py, state)?;
        let ids = Tokens::of(prompt)?.ids(&self.inner().tokenizer, lease.cache.position(0) == 0);
        let ids = ids.map_err(|error| exception(py, &error))?;
        if ids.is_empty() {
            return Err(input(py, "the prompt has no tokens", "give some text to continue"));
        }
        Request::new(py, self.shared.clone(), ids, lease, options)
    }
}

#[pymethods]
impl Model {
    /// Loads a model: a Hugging Face directory, a .gguf file, a hub id, a student, or a built-in one ("demo").
    #[staticmethod]
    #[pyo3(signature = (path, *, device = "cpu", dtype = None, weights = "file"))]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        device: &str,
        dtype: Option<&str>,
        weights: &str,
    ) -> PyResult<Self> {
        let Some(name) = path.to_str().map(str::to_owned) else {
            return Err(input(py, "the model's path is not UTF-8", "rename it"));
        };
        let weights = one_of(py, "weights", weights, &WeightFormat::ALL, WeightFormat::name)?;
        let dtype = dtype.map(|dtype| one_of(py, "dtype", dtype, &DTYPES, |one| one.as_str()));
        let (dtype, device) = (dtype.transpose()?, device.to_owned());
        let load = {
            let name = name.clone();
            move || {
                let device = still_model::device(&device)?;
                let dtype = dtype.map_or_else(|| usual_dtype(&device), Ok)?;
                if is_built_in(&name) {
                    fetch::demo_model(&mut |_| ())?;
                }
                Ok(still_model::Model::load_in(&name, &device, dtype, weights)?)
            }
        };
        Ok(Self::new(work(py, Cancel::default(), load)?, name))
    }

    /// Whether it has a student's attention.
    #[getter]
    fn is_student(&self) -> bool {
        self.inner().student.is_some()
    }

    /// Rows of the logits' vocabulary.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner().config().vocab_size
    }

    /// The base's configuration, by Hugging Face's names.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.inner().config().to_hf_json())
    }

    /// The same weights with dense attention.
    fn teacher(&self) -> Self {
        Self::new(self.inner().teacher(), self.name.clone())
    }

    /// Token ids of a text.
    #[pyo3(signature = (text, *, add_special = true))]
    fn tokenize(&self, py: Python<'_>, text: &str, add_special: bool) -> PyResult<Vec<u32>> {
        let ids = self.inner().tokenizer.encode(text, add_special);
        ids.map_err(|error| exception(py, &error.into()))
    }

    /// The text of token ids.
    #[pyo3(signature = (ids, *, skip_special = true))]
    fn detokenize(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        skip_special: bool,
    ) -> PyResult<String> {
        let tokenizer = &self.inner().tokenizer;
        let text = Tokens::of(ids)?
            .ids(tokenizer, false)
            .and_then(|ids| Ok(tokenizer.decode(&ids, skip_special)?));
        text.map_err(|error| exception(py, &error))
    }

    /// A conversation as the model's chat template renders it.
    #[pyo3(signature = (messages, *, add_generation_prompt = true))]
    fn chat_prompt(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyList>,
        add_generation_prompt: bool,
    ) -> PyResult<String> {
        let Some(template) = self.inner().tokenizer.chat_template() else {
            return Err(input(
                py,
                "the model has no chat template",
                "generate from plain text instead",
            ));
        };
        let text: String = py.import("json")?.call_method1("dumps", (messages,))?.extract()?;
        let rendered = serde_json::from_str::<Vec<Message>>(&text)
            .map_err(|error| ModelError::ChatTemplate(format!("messages: {error}")))
            .and_then(|messages| template.render(&messages, add_generation_prompt));
        rendered.map_err(|error| exception(py, &error.into()))
    }

    /// Continues a prompt.
    #[pyo3(signature = (prompt, *, state = None, **options))]
    fn generate(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        state: Option<&State>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        self.request(py, prompt, state, options)?.generate(py)
    }

    /// Continues a prompt piece by piece.
    #[pyo3(signature = (prompt, *, state = None, **options))]
    fn stream(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        state: Option<&State>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Stream> {
        self.request(py, prompt, state, options)?.stream(py)
    }

    /// Logits after every token, `[tokens, vocab]`, or after the last one, `[vocab]`; float32.
    #[pyo3(signature = (tokens, *, state = None, last = false))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        state: Option<&State>,
        last: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut lease = self.lease(py, state)?;
        let (shared, cancel) = (self.shared.clone(), Cancel::default());
        let begins = lease.cache.position(0) == 0;
        let ids = Tokens::of(tokens)?.ids(&shared.model.tokenizer, begins);
        let ids = ids.map_err(|error| exception(py, &error))?;
        let (count, vocab) = (if last { 1 } else { ids.len() }, shared.model.config().vocab_size);
        let values = work(py, cancel.clone(), move || {
            let values = if last {
                let reading = OnRead::default();
                let hidden =
                    shared.model.prefill_until(&ids, &mut lease.cache, &cancel, &reading)?;
                values_of(&shared.model, &hidden)?
            } else {
                all_logits(&shared.model, &ids, &mut lease, &cancel)?
            };
            lease.commit();
            Ok(values)
        })?;
        Ok(match last {
            true => PyArray1::from_vec(py, values).into_any(),
            false => {
                let flat = PyArray1::from_vec(py, values);
                let shaped: Bound<'py, PyArray2<f32>> = flat.reshape([count, vocab])?;
                shaped.into_any()
            }
        })
    }

    /// A state that has read nothing.
    #[pyo3(signature = (*, rows = None))]
    fn new_state(&self, py: Python<'_>, rows: Option<&str>) -> PyResult<State> {
        let rows = self.rows(py, rows)?;
        let cache = self.inner().new_cache(1, rows);
        let cache = cache.map_err(|error| exception(py, &error.into()))?;
        Ok(State::new(self.shared.clone(), rows, cache))
    }

    /// A state that was saved.
    fn restore(&self, py: Python<'_>, path: PathBuf) -> PyResult<State> {
        let shared = self.shared.clone();
        work(py, Cancel::default(), move || State::read_file(shared, &path))
    }

    /// Saves a student: whole, or only what differs from its base.
    #[pyo3(signature = (path, *, delta = false))]
    fn save(&self, py: Python<'_>, path: PathBuf, delta: bool) -> PyResult<()> {
        if path.symlink_metadata().is_ok() {
            let what = format!("{} exists already", path.display());
            return Err(input(py, &what, "choose another path, or remove what is there"));
        }
        let shared = self.shared.clone();
        let kind = if delta { ExportKind::Delta } else { ExportKind::Full(DType::F32) };
        work(py, Cancel::default(), move || {
            Ok(still_model::save_student(&path, &shared.model, kind)?)
        })
    }

    fn __repr__(&self) -> String {
        let kind = if self.is_student() { "student" } else { "base" };
        format!("<still.Model {:?}, a {kind} on {:?}>", self.name, self.inner().device().location())
    }
}

/// Logits of hidden states, in float32.
fn values_of(
    model: &still_model::Model,
    hidden: &candle_core::Tensor,
) -> still_model::Result<Vec<f32>> {
    Ok(model.logits(hidden)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// Logits after every token, row by row.
fn all_logits(
    model: &still_model::Model,
    ids: &[u32],
    lease: &mut Lease,
    cancel: &Cancel,
) -> anyhow::Result<Vec<f32>> {
    let vocab = model.config().vocab_size;
    let mut values = Vec::new();
    let count = ids.len().checked_mul(vocab);
    count.and_then(|count| values.try_reserve_exact(count).ok()).with_context(|| {
        ModelError::Invalid(format!("no memory for the logits of {} tokens", ids.len()))
    })?;
    values.resize(ids.len() * vocab, f32::NAN);
    let rows = Mutex::new(values);
    model.read_until(ids, &mut lease.cache, cancel, |start, hidden| {
        let block = values_of(model, &hidden)?;
        let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
        let place = rows.get_mut(start * vocab..start * vocab + block.len());
        place
            .ok_or_else(|| ModelError::Invalid("more logits than tokens".into()))?
            .copy_from_slice(&block);
        Ok::<_, ModelError>(())
    })?;
    let values = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    match ids.is_empty() {
        true => Err(anyhow!(ModelError::Invalid("there are no tokens".into()))),
        false => Ok(values),
    }
}
