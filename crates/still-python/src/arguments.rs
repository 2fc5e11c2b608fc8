//! Conversion of arguments.

use std::path::PathBuf;

use anyhow::anyhow;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use serde::Serialize;
use still_model::Tokenizer;

use crate::errors::{exception, input};

/// A prompt: a text, or token ids.
pub enum Tokens {
    Text(String),
    Ids(Vec<u32>),
}

impl Tokens {
    /// Of a `str`, or of anything that iterates over integers: a list, an array, a tensor.
    ///
    /// # Errors
    /// Something else.
    pub fn of(given: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(text) = given.cast::<PyString>() {
            return Ok(Self::Text(text.extract()?));
        }
        let wrong = |_| {
            let found = given.get_type();
            PyTypeError::new_err(format!("expected a str or token ids (integers), got {found}"))
        };
        let ids = given.try_iter().map_err(wrong)?;
        ids.map(|id| id?.extract().map_err(wrong)).collect::<PyResult<_>>().map(Self::Ids)
    }

    /// The ids; those of a text with what the tokenizer puts around a document, if the text begins a sequence.
    ///
    /// # Errors
    /// A text that the tokenizer refuses.
    pub fn ids(self, tokenizer: &Tokenizer, begins: bool) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::Text(text) => Ok(tokenizer.encode(&text, begins)?),
            Self::Ids(ids) => Ok(ids),
        }
    }
}

/// One of several values by its name.
///
/// # Errors
/// No such name; the hint lists those that there are.
pub fn one_of<T: Copy>(
    py: Python<'_>,
    what: &str,
    name: &str,
    all: &[T],
    name_of: impl Fn(T) -> &'static str,
) -> PyResult<T> {
    all.iter().copied().find(|&one| name_of(one) == name).ok_or_else(|| {
        let known: Vec<&str> = all.iter().map(|&one| name_of(one)).collect();
        input(py, &format!("{what} {name:?} is unknown"), &format!("use {}", known.join(", ")))
    })
}

/// Paths: one, or several.
///
/// # Errors
/// Something else.
pub fn paths(given: &Bound<'_, PyAny>) -> PyResult<Vec<PathBuf>> {
    if let Ok(path) = given.extract::<PathBuf>() {
        return Ok(vec![path]);
    }
    given.try_iter()?.map(|path| path?.extract()).collect()
}

/// Overrides of a recipe as `--set` takes them: a dict of dotted keys, or of dicts of them.
///
/// # Errors
/// Keys that are no strings, values that no recipe has.
pub fn overrides(given: Option<&Bound<'_, PyDict>>) -> PyResult<Vec<String>> {
    let mut all = Vec::new();
    if let Some(given) = given {
        add_overrides("", given, &mut all)?;
    }
    Ok(all)
}

fn add_overrides(section: &str, given: &Bound<'_, PyDict>, all: &mut Vec<String>) -> PyResult<()> {
    let json = given.py().import("json")?;
    for (key, value) in given {
        let key = format!("{section}{}", key.extract::<String>()?);
        if let Ok(inner) = value.cast::<PyDict>() {
            add_overrides(&format!("{key}."), inner, all)?;
            continue;
        }
        // Booleans, numbers, strings and lists of them are in TOML as they are in JSON.
        let value: String = json.call_method1("dumps", (value,))?.extract()?;
        all.push(format!("{key}={value}"));
    }
    Ok(())
}

/// A value of ours as Python's dicts, lists, strings and numbers.
///
/// # Errors
/// One that JSON cannot say.
pub fn to_python<'py>(py: Python<'py>, value: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| exception(py, &anyhow!(error)))?;
    py.import("json")?.call_method1("loads", (text,))
}

/// An error unless `value` is at least 1.
///
/// # Errors
/// 0.
pub fn positive(name: &str, value: usize) -> PyResult<usize> {
    match value {
        0 => Err(PyValueError::new_err(format!("{name} is 0; it must be at least 1"))),
        _ => Ok(value),
    }
}
