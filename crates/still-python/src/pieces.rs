//! Pieces of a run, for `still.torch`: the recipe, the student that training begins with, windows of text, and a student's folder.
//!
//! PyTorch trains; everything that must be alike in both trainers is made here, by the code of the other one.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, anyhow};
use candle_core::DType;
use numpy::IntoPyArray;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;
use still_cli::data_files;
use still_model::{Cancel, FullStudent, ModelConfig, OnFetch, Student, Tokenizer, seal};
use still_train::{Budgets, Position, Recipe, TokenCache, Window};

use crate::arguments::{one_of, overrides, paths};
use crate::errors::exception;
use crate::operator::array;
use crate::work::work;

/// Dtypes that base weights are saved in.
const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn failed(py: Python<'_>) -> impl Fn(anyhow::Error) -> PyErr {
    move |error| exception(py, &error)
}

/// A recipe as JSON: by name or file, with what is changed of it and budgets from a file that calibration left.
#[pyfunction]
#[pyo3(signature = (recipe, changed, budgets))]
pub fn resolve_recipe(
    py: Python<'_>,
    recipe: PathBuf,
    changed: Option<&Bound<'_, PyDict>>,
    budgets: Option<PathBuf>,
) -> PyResult<String> {
    let changed = overrides(changed)?;
    let resolve = || -> anyhow::Result<String> {
        let mut recipe = Recipe::read(Some(&recipe), &changed)?;
        if let Some(path) = budgets {
            recipe.attention = Budgets::read(&path)?.apply(&recipe.attention)?;
        }
        Ok(serde_json::to_string(&recipe)?)
    };
    resolve().map_err(failed(py))
}

/// A resolved recipe.
///
/// # Errors
/// Another text than [`resolve_recipe`] gives.
pub fn parsed_recipe(text: &str) -> anyhow::Result<Recipe> {
    let recipe: Recipe = serde_json::from_str(text).context("the recipe")?;
    recipe.validate()?;
    Ok(recipe)
}

/// A base's configuration and the student that a recipe begins with, low-rank updates among it.
fn fresh(config: &str, recipe: &str) -> anyhow::Result<(ModelConfig, Student)> {
    let config = ModelConfig::from_hf_json(&serde_json::from_str(config)?)?;
    let recipe = parsed_recipe(recipe)?;
    let still = recipe.attention.resolve(&config)?;
    let mut student = Student::init(still, &config, recipe.attention.init, recipe.seed)?;
    student.add_lora(&config, recipe.finetune.lora.clone(), recipe.seed)?;
    student.recipe = Some(serde_json::to_value(&recipe)?);
    Ok((config, student))
}

/// The section `still` of the student that a recipe begins with, as JSON, and its learned tensors by their names in a checkpoint.
#[pyfunction]
pub fn begin_student<'py>(
    py: Python<'py>,
    config: &str,
    recipe: &str,
) -> PyResult<(String, Bound<'py, PyDict>)> {
    let (_, student) = fresh(config, recipe).map_err(failed(py))?;
    let section = serde_json::to_string(&student.config).map_err(|e| exception(py, &e.into()))?;
    let named = student.checkpoint_tensors().map_err(|error| exception(py, &error.into()))?;
    let tensors = PyDict::new(py);
    for (name, tensor) in named {
        tensors.set_item(name, array(py, &tensor)?)?;
    }
    Ok((section, tensors))
}

/// Writes all of a student's folder but its weights, and the digest into those, which are there already.
#[pyfunction]
pub fn finish_student(
    py: Python<'_>,
    dir: PathBuf,
    config: &str,
    recipe: &str,
    tokenizer: PathBuf,
    generation: Option<&str>,
    dtype: &str,
) -> PyResult<()> {
    let dtype = one_of(py, "dtype", dtype, &DTYPES, |dtype| dtype.as_str())?;
    let finish = || -> anyhow::Result<()> {
        let (config, student) = fresh(config, recipe)?;
        let tokenizer = Tokenizer::from_hf_dir(&tokenizer)?;
        let generation: Option<Value> = generation.map(serde_json::from_str).transpose()?;
        let folder = FullStudent {
            config: &config,
            student: &student.without_updates()?,
            tokenizer: &tokenizer,
            generation: generation.as_ref(),
            dtype,
        };
        folder.write(&dir)?;
        let path = dir.join("model.safetensors");
        let mut file = File::options().read(true).write(true).open(&path)?;
        Ok(seal::seal(&mut file, seal::Kind::Safetensors)?)
    };
    finish().map_err(failed(py))
}

/// Text as the windows of a run, in their order.
#[pyclass(frozen, module = "still._still")]
pub struct Windows {
    windows: still_train::Windows,
    position: Mutex<Position>,
}

/// Token ids, where each sequence ends among them, and which of them stage 2 counts; all if absent.
type Read<'py> = (Bound<'py, PyAny>, Vec<usize>, Option<Vec<bool>>);

fn read<'py>(py: Python<'py>, window: &Window) -> Read<'py> {
    let ids: Vec<i64> = window.ids().iter().map(|&id| i64::from(id)).collect();
    let mut ends = Vec::new();
    let mut counted = Vec::new();
    let mut some = false;
    for segment in window.segments() {
        ends.push(ends.last().copied().unwrap_or(0) + segment.ids.len());
        some |= segment.counted.is_some();
        match segment.counted {
            Some(mask) => counted.extend_from_slice(mask),
            None => counted.resize(counted.len() + segment.ids.len(), true),
        }
    }
    (ids.into_pyarray(py).into_any(), ends, some.then_some(counted))
}

#[pymethods]
impl Windows {
    /// Reads files as a run of the recipe does, tokenized by `tokenizer.json` in a directory.
    #[new]
    fn new(
        py: Python<'_>,
        data: &Bound<'_, PyAny>,
        tokenizer: PathBuf,
        recipe: &str,
    ) -> PyResult<Self> {
        let data = paths(data)?;
        let recipe = parsed_recipe(recipe).map_err(failed(py))?;
        let windows = work(py, Cancel::default(), move || {
            let tokenizer = Tokenizer::from_hf_dir(&tokenizer)?;
            let (files, cache) = (data_files(&data, &OnFetch::default())?, TokenCache::user()?);
            Ok(still_train::Windows::read(&files, &tokenizer, &recipe.data, recipe.seed, &cache)?)
        })?;
        Ok(Self { windows, position: Mutex::default() })
    }

    /// The next windows, all of one length.
    fn next<'py>(&self, py: Python<'py>, count: usize) -> Vec<Read<'py>> {
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        self.windows.next(&mut position, count).iter().map(|window| read(py, window)).collect()
    }

    /// Windows to evaluate on.
    fn heldout<'py>(&self, py: Python<'py>) -> Vec<Read<'py>> {
        self.windows.heldout().iter().map(|window| read(py, window)).collect()
    }

    /// How far they are read, as JSON.
    #[getter]
    fn position(&self, py: Python<'_>) -> PyResult<String> {
        let position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::to_string(&*position).map_err(|error| exception(py, &anyhow!(error)))
    }

    /// Goes on from a position.
    fn seek(&self, py: Python<'_>, position: &str) -> PyResult<()> {
        let given: Position =
            serde_json::from_str(position).map_err(|error| exception(py, &anyhow!(error)))?;
        *self.position.lock().unwrap_or_else(PoisonError::into_inner) = given;
        Ok(())
    }

    /// SHA-256 of the token ids.
    #[getter]
    fn sha256(&self) -> String {
        self.windows.sha256()
    }
}
