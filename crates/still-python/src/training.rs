//! Calibration and both training stages.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Map, Value, json};
use still_attention::RowDtype;
use still_cli::data_files;
use still_model::{ExportKind, ModelError, OnFetch, StudentTarget, save_student_to};
use still_train::{
    BuiltIn, CalibrateOptions, CalibrationRecipe, Evaluation, Observer, Phase, Recipe, RunDir,
    Stage, StepReport, TokenCache, TrainError, Windows,
};

use crate::arguments::{one_of, overrides, paths, to_python};
use crate::callback::Callback;
use crate::errors::{exception, input};
use crate::model::{Model, Shared};
use crate::work::unwind_if;

/// A recipe by name, file or what is usual for the model's device, with what is changed of it.
fn recipe(
    py: Python<'_>,
    model: &Shared,
    named: Option<PathBuf>,
    changed: Option<&Bound<'_, PyDict>>,
) -> PyResult<Recipe> {
    let changed = overrides(changed)?;
    let read = match named {
        Some(named) => Recipe::read(Some(&named), &changed),
        None => Recipe::parse(BuiltIn::usual(model.model.device()).text, &changed),
    };
    read.map_err(|error| exception(py, &error.into()))
}

/// The model, which must be a base.
fn base(py: Python<'_>, model: &Model) -> PyResult<Arc<Shared>> {
    match model.shared.model.student {
        None => Ok(model.shared.clone()),
        Some(_) => Err(input(
            py,
            "the model is a student already",
            "load the base model that it came from, or take model.teacher()",
        )),
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Retrieval => "retrieval",
        Phase::Text => "text",
    }
}

/// Finds a budget for every head, as `still calibrate` does.
#[pyfunction]
#[pyo3(signature = (
    model, data, *, recipe = None, set = None, cache_fraction = None, at_length = None, tokens = None, window = None,
    rows = None, out = None, progress = None
))]
pub fn calibrate<'py>(
    py: Python<'py>,
    model: &Model,
    data: &Bound<'py, PyAny>,
    recipe: Option<PathBuf>,
    set: Option<&Bound<'py, PyDict>>,
    cache_fraction: Option<f64>,
    at_length: Option<usize>,
    tokens: Option<usize>,
    window: Option<usize>,
    rows: Option<&str>,
    out: Option<PathBuf>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let shared = base(py, model)?;
    let mut recipe = self::recipe(py, &shared, recipe, set)?;
    let rows = rows.map(|rows| one_of(py, "rows", rows, &RowDtype::ALL, RowDtype::name));
    recipe.attention.rows = rows.transpose()?.or(recipe.attention.rows);
    let own = recipe.calibration.clone();
    recipe.calibration = CalibrationRecipe {
        cache_fraction: cache_fraction.or(own.cache_fraction),
        at_length: at_length.unwrap_or(own.at_length),
        tokens: tokens.unwrap_or(own.tokens),
        window: window.unwrap_or(own.window),
    };
    recipe.validate().map_err(|error| exception(py, &error.into()))?;
    let data = paths(data)?;
    let callback = Callback::new(progress);
    let told = callback.clone();
    let found = callback.work(py, move || {
        let (model, calibration) = (&shared.model, &recipe.calibration);
        let text = calibration.text(&recipe.data);
        let (files, cache) = (data_files(&data, &OnFetch::default())?, TokenCache::user()?);
        let text = Windows::read(&files, &model.tokenizer, &text, recipe.seed, &cache)?
            .first_tokens(calibration.tokens);
        let windows: Vec<&[u32]> = text.iter().map(Vec::as_slice).collect();
        let usual = CalibrateOptions::usual_cache_fraction(model.config(), calibration.at_length);
        let share = calibration.cache_fraction.unwrap_or(usual);
        let options = calibration.options_at(share, recipe.seed);
        let mut read = Read::default();
        let read = std::cell::RefCell::new(&mut read);
        let attention = &recipe.attention;
        let found =
            still_train::calibrate(model, attention, &windows, &options, &|phase, more, of| {
                told.tell(&read.borrow_mut().event(phase, more, of));
                // Called between windows, on the thread that called `calibrate`.
                unwind_if(told.cancel());
            })?;
        if let Some(out) = out {
            found.budgets.save(&out)?;
        }
        Ok(found)
    })?;
    to_python(py, &found)
}

/// Tokens passed in each phase.
#[derive(Default)]
struct Read {
    retrieval: usize,
    text: usize,
}

impl Read {
    fn event(&mut self, phase: Phase, more: usize, of: usize) -> Value {
        let done = match phase {
            Phase::Retrieval => &mut self.retrieval,
            Phase::Text => &mut self.text,
        };
        *done += more;
        json!({ "event": "calibration", "phase": phase_name(phase), "done": *done, "of": of })
    }
}

/// Trains a student: calibration if the recipe asks for it, both stages, and the student saved to `out`.
#[pyfunction]
#[pyo3(signature = (
    model, data, out, *, recipe = None, set = None, run_dir = None, resume = false, delta = false, overwrite = false,
    progress = None
))]
pub fn linearize(
    py: Python<'_>,
    model: &Model,
    data: &Bound<'_, PyAny>,
    out: PathBuf,
    recipe: Option<PathBuf>,
    set: Option<&Bound<'_, PyDict>>,
    run_dir: Option<PathBuf>,
    resume: bool,
    delta: bool,
    overwrite: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Model> {
    let shared = base(py, model)?;
    let recipe = self::recipe(py, &shared, recipe, set)?;
    let data = paths(data)?;
    // Without a slash at the end: what is added to the name is then part of it.
    let out: PathBuf = out.components().collect();
    let Some(name) = out.file_name() else {
        let what = format!("{} names no directory", out.display());
        return Err(input(py, &what, "end it with the name of a directory that is not there yet"));
    };
    if out.symlink_metadata().is_ok() && !overwrite {
        let what = format!("{} exists already", out.display());
        return Err(input(py, &what, "choose another `out`, or pass overwrite=True"));
    }
    let run_dir = run_dir.unwrap_or_else(|| {
        let mut name = name.to_owned();
        name.push(".run");
        out.with_file_name(name)
    });
    let kind = if delta { ExportKind::Delta } else { ExportKind::Full(DType::F32) };
    let callback = Callback::new(progress);
    let told = callback.clone();
    let saved_to = out.display().to_string();
    let student = callback.work(py, move || {
        let (files, cache) = (data_files(&data, &OnFetch::default())?, TokenCache::user()?);
        let run_dir = RunDir::claim(&run_dir, resume)?;
        let target = StudentTarget::claim(&out)?;
        let (model, mut observer) =
            (&shared.model, CallbackObserver { callback: told, read: Read::default() });
        let recipe = still_train::calibrated_recipe(
            model,
            &recipe,
            &files,
            &cache,
            run_dir.path(),
            &mut observer,
        )?;
        let windows = Windows::read(&files, &model.tokenizer, &recipe.data, recipe.seed, &cache)?;
        let student =
            still_train::linearize_in(model, &recipe, &windows, &run_dir, resume, &mut observer);
        let student = student.map_err(|error| match error {
            TrainError::Interrupted { .. } => anyhow::Error::from(ModelError::Cancelled),
            other => other.into(),
        })?;
        save_student_to(&target, &student, kind)?;
        Ok(student)
    })?;
    Ok(Model::new(student, saved_to))
}

/// Tells a callable of a run.
struct CallbackObserver {
    callback: Callback,
    read: Read,
}

impl CallbackObserver {
    /// An event with the values of something that has fields.
    fn of(&self, name: &str, fields: &impl serde::Serialize) {
        let mut event = Map::from_iter([("event".to_owned(), json!(name))]);
        if let Ok(Value::Object(fields)) = serde_json::to_value(fields) {
            event.extend(fields);
        }
        self.callback.tell(&event);
    }
}

impl Observer for CallbackObserver {
    fn on_calibration(&mut self, phase: Phase, tokens: usize, of: usize) {
        let event = self.read.event(phase, tokens, of);
        self.callback.tell(&event);
        unwind_if(self.callback.cancel());
    }

    fn on_stage(&mut self, stage: Stage, steps: usize, done: usize) {
        self.of("stage", &json!({ "stage": stage.name(), "steps": steps, "done": done }));
    }

    fn on_step(&mut self, report: &StepReport) {
        self.of("step", report);
    }

    fn on_evaluation(&mut self, evaluation: &Evaluation) {
        self.of("evaluation", evaluation);
    }

    fn on_checkpoint(&mut self, path: &Path) {
        self.of("checkpoint", &json!({ "path": path.display().to_string() }));
    }

    fn stop_requested(&self) -> bool {
        self.callback.cancel().is_raised()
    }
}
