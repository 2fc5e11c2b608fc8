//! What a `config.json` describes. It is decided here alone, by `model_type` and `still_format`:
//!
//! | `model_type` | `still_format` | section `still` | |
//! |---|---|---|---|
//! | `still` | 1 | yes | a student of ours; `base_config` is the configuration of its base |
//! | `still` | absent | no | a checkpoint of the code that STILL's authors released |
//! | another | absent | yes | a student of ours from before there was a `still_format`; the configuration is its base's |
//! | another | absent | no | a base model |
//!
//! A student says `still`, so that no program that does not know it opens a linearized model as a dense one.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use still_attention::StillConfig;

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::student::{LoraConfig, Student};

/// The newest form of a student that this version knows, and the one that it writes.
const FORMAT: u64 = 1;
const FORMAT_KEY: &str = "still_format";
const MODEL_TYPE: &str = "still";
const CLASS: &str = "StillForCausalLM";
/// The base's own configuration.
pub(super) const BASE_CONFIG_KEY: &str = "base_config";
/// The attention.
pub(super) const STILL_KEY: &str = "still";
/// The updates of a delta.
pub(super) const LORA_KEY: &str = "still_lora";
/// The recipe.
const RECIPE_KEY: &str = "still_recipe";
/// The base of a delta.
pub(super) const BASE_KEY: &str = "still_base";

/// What a configuration describes.
pub(super) enum Form {
    /// A model with softmax attention: its configuration.
    Base(Value),
    /// A student of ours.
    Student(Box<StudentForm>),
    /// A checkpoint of the released code of STILL's authors: its configuration.
    Authors(Value),
}

/// The configuration of a student.
pub(super) struct StudentForm {
    /// Of its base, in Hugging Face's words.
    pub base_config: Value,
    pub still: StillConfig,
    pub lora: Option<LoraConfig>,
    pub recipe: Option<Value>,
    /// Present in a delta.
    pub base: Option<Value>,
    /// Whether its files have digests. Those from before there was a `still_format` have none.
    pub sealed: bool,
}

impl StudentForm {
    /// Checks what the file `path` says of a student against its base.
    ///
    /// # Errors
    /// A value out of range or one that does not fit the base, with its section.
    pub fn check(&self, base: &ModelConfig, path: &Path) -> Result<()> {
        let in_section = |key: &str, reason: String| ModelError::Corrupt {
            path: path.to_path_buf(),
            reason: format!("section \"{key}\": {reason}"),
            hint: "the student was saved for another base, or the file was edited".into(),
        };
        let checked = base.check_still(&self.still);
        checked.map_err(|error| in_section(STILL_KEY, error.to_string()))?;
        let Some(lora) = &self.lora else { return Ok(()) };
        lora.validate().map_err(|error| in_section(LORA_KEY, error.to_string()))?;
        if self.base.is_none() {
            let reason = format!("there is no {BASE_KEY} beside it: a full student's are merged");
            return Err(in_section(LORA_KEY, reason));
        }
        Ok(())
    }
}

/// Reads the JSON of the file `path`.
///
/// # Errors
/// A student of a newer form, or one that lacks a part of its own.
pub(super) fn of(mut json: Value, path: &Path) -> Result<Form> {
    let is_still = json["model_type"] == MODEL_TYPE;
    let sealed = match (&json[FORMAT_KEY], is_still) {
        (Value::Null, true) if json.get(STILL_KEY).is_none() => return Ok(Form::Authors(json)),
        (Value::Null, true) => {
            let reason = format!("\"{STILL_KEY}\" without \"{FORMAT_KEY}\"");
            return Err(ModelError::corrupt(path, reason));
        }
        (Value::Null, false) => {
            if json[STILL_KEY].is_null() {
                return Ok(Form::Base(json));
            }
            tracing::warn!(
                "{} describes a student of an older version: its files have no digests, and other programs take a full \
                 one for a dense model; linearize or export it again",
                path.display()
            );
            false
        }
        (_, false) => {
            let reason =
                format!("\"{FORMAT_KEY}\" with another \"model_type\" than \"{MODEL_TYPE}\"");
            return Err(ModelError::corrupt(path, reason));
        }
        (format, true) => {
            check_format(format, path)?;
            true
        }
    };
    let section = |key: &str| {
        let reason = format!("a student's \"{key}\" is missing");
        json.get(key).filter(|value| value.is_object()).ok_or(ModelError::corrupt(path, reason))
    };
    section(STILL_KEY)?;
    if sealed {
        section(BASE_CONFIG_KEY)?;
    }
    let still = parsed(&json, STILL_KEY, path)?;
    let (lora, recipe) = (parsed(&json, LORA_KEY, path)?, parsed(&json, RECIPE_KEY, path)?);
    let base = parsed(&json, BASE_KEY, path)?;
    let base_config = if sealed { json[BASE_CONFIG_KEY].take() } else { json };
    let Some(still) = still else {
        return Err(ModelError::corrupt(path, format!("a student's \"{STILL_KEY}\" is missing")));
    };
    Ok(Form::Student(Box::new(StudentForm { base_config, still, lora, recipe, base, sealed })))
}

fn check_format(format: &Value, path: &Path) -> Result<()> {
    match format.as_u64() {
        Some(1..=FORMAT) => Ok(()),
        Some(newer) if newer > FORMAT => Err(ModelError::Unsupported {
            what: format!("a student of format {newer}, made by a newer version of still,"),
            found_in: Some(path.to_path_buf()),
            hint: format!(
                "this version reads formats up to {FORMAT}: update it, or export the student with it again"
            ),
        }),
        _ => Err(ModelError::corrupt(path, format!("\"{FORMAT_KEY}\" is {format}"))),
    }
}

fn parsed<T: DeserializeOwned>(json: &Value, key: &str, path: &Path) -> Result<Option<T>> {
    json.get(key)
        .filter(|value| !value.is_null())
        .map(|value| serde_json::from_value(value.clone()))
        .transpose()
        .map_err(|error| ModelError::corrupt(path, format!("section \"{key}\": {error}")))
}

/// Whether some JSON describes a student, of whatever form.
pub(super) fn is_student(json: &Value) -> bool {
    json.get(STILL_KEY).is_some_and(Value::is_object)
}

/// The configuration of a student with all its weights.
pub(super) fn student_config(config: &ModelConfig, student: &Student) -> Result<Value> {
    let mut json = json!({
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        FORMAT_KEY: FORMAT,
        BASE_CONFIG_KEY: config.to_hf_json(),
        STILL_KEY: to_json(&student.config)?,
    });
    if let Some(recipe) = &student.recipe {
        json[RECIPE_KEY] = recipe.clone();
    }
    Ok(json)
}

pub(super) fn to_json(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| ModelError::Invalid(error.to_string()))
}
