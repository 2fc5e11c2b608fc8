//! Students on disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use still_attention::StillConfig;

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::files::{save_tensors, staging_dir, sync_files};
use crate::model::Model;
use crate::student::{LoraConfig, Student};

/// The attention, in `config.json`.
const STILL_KEY: &str = "still";
/// The updates of a delta, in `config.json`.
const LORA_KEY: &str = "still_lora";
/// The recipe, in `config.json`.
const RECIPE_KEY: &str = "still_recipe";
/// The base of a delta, in `config.json`.
pub(super) const BASE_KEY: &str = "still_base";
/// The learned tensors of a delta.
pub(super) const DELTA_FILE: &str = "student.safetensors";

/// What `config.json` holds of a student.
pub(super) struct Sections {
    pub still: Option<StillConfig>,
    pub lora: Option<LoraConfig>,
    pub recipe: Option<Value>,
    pub base: Option<Value>,
}

impl Sections {
    /// From the JSON of the file `path`; a base model's has none.
    ///
    /// # Errors
    /// A section of another form.
    pub fn read(json: &Value, path: &Path) -> Result<Self> {
        fn parsed<T: DeserializeOwned>(json: &Value, key: &str, path: &Path) -> Result<Option<T>> {
            json.get(key)
                .filter(|value| !value.is_null())
                .map(|value| serde_json::from_value(value.clone()))
                .transpose()
                .map_err(|error| ModelError::corrupt(path, format!("section \"{key}\": {error}")))
        }
        Ok(Self {
            still: parsed(json, STILL_KEY, path)?,
            lora: parsed(json, LORA_KEY, path)?,
            recipe: parsed(json, RECIPE_KEY, path)?,
            base: parsed(json, BASE_KEY, path)?,
        })
    }
}

/// The `config.json` of a student with all its weights.
pub(super) fn full_config(config: &ModelConfig, student: &Student) -> Result<Value> {
    let mut json = config.to_hf_json();
    json[STILL_KEY] = to_json(&student.config)?;
    if let Some(recipe) = &student.recipe {
        json[RECIPE_KEY] = recipe.clone();
    }
    Ok(json)
}

/// What a saved student holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// All weights, low-rank updates merged, in this dtype (learned attention tensors stay f32).
    Full(DType),
    /// Only what differs from the base, which is named and hashed.
    Delta,
}

/// Saves a student; a student that stood there before is replaced only once the new one is complete.
///
/// # Errors
/// A model without a student, a target that is something else, a full disk.
pub fn save_student(dir: &Path, model: &Model, kind: ExportKind) -> Result<()> {
    let student = model.student.as_ref().ok_or_else(|| {
        ModelError::Invalid("a model without a student has nothing to save".into())
    })?;
    refuse_foreign(dir)?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(ModelError::write(parent))?;
    let staging = staging_dir(parent, ".still-saving-").map_err(ModelError::write(parent))?;

    let mut config = full_config(model.config(), student)?;
    match kind {
        ExportKind::Full(dtype) => {
            let (decoder, student) = student.merged_into(&model.decoder)?;
            config["torch_dtype"] = json!(dtype_name(dtype)?);
            let mut tensors = HashMap::new();
            decoder.visit_tensors(|name, tensor| {
                tensors.insert(name.to_owned(), tensor.to_dtype(dtype)?);
                Ok(())
            })?;
            tensors.extend(student.checkpoint_tensors()?);
            let path = staging.path().join("model.safetensors");
            save_tensors(&path, &tensors).map_err(ModelError::write(&path))?;
        }
        ExportKind::Delta => {
            if model.base.files.is_empty() {
                return Err(ModelError::Invalid(
                    "a delta needs a base on disk; this model was made in memory".into(),
                ));
            }
            let source = absolute(&model.base.source);
            config[BASE_KEY] = json!({ "source": source, "sha256": model.base.sha256()? });
            if let Some(lora) = &student.lora {
                config[LORA_KEY] = to_json(lora)?;
            }
            let tensors = student.checkpoint_tensors()?.into_iter().collect();
            let path = staging.path().join(DELTA_FILE);
            save_tensors(&path, &tensors).map_err(ModelError::write(&path))?;
        }
    }
    model.tokenizer.save(staging.path())?;
    let path = staging.path().join("config.json");
    let text = format!("{config:#}\n");
    std::fs::write(&path, text).map_err(ModelError::write(&path))?;
    sync_files(staging.path()).map_err(ModelError::write(staging.path()))?;
    replace(staging, dir)
}

/// An error unless `dir` is free, empty or a student.
fn refuse_foreign(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let student = std::fs::read_to_string(dir.join("config.json"))
        .ok()
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .is_some_and(|config| config.get(STILL_KEY).is_some());
    let empty = dir.read_dir().map_err(ModelError::read(dir))?.next().is_none();
    if student || empty {
        return Ok(());
    }
    Err(ModelError::Corrupt {
        path: dir.to_path_buf(),
        reason: "exists and is not a student".into(),
        hint: "choose another output directory".into(),
    })
}

/// Moves a complete directory into place; what stood there is kept until then.
fn replace(staging: tempfile::TempDir, dir: &Path) -> Result<()> {
    let staged = staging.keep();
    let previous = previous_path(dir);
    if dir.exists() {
        if previous.exists() {
            std::fs::remove_dir_all(&previous).map_err(ModelError::write(&previous))?;
        }
        std::fs::rename(dir, &previous).map_err(ModelError::write(dir))?;
    }
    std::fs::rename(&staged, dir).map_err(ModelError::write(dir))?;
    if previous.exists() {
        std::fs::remove_dir_all(&previous).map_err(ModelError::write(&previous))?;
    }
    Ok(())
}

/// Where a student waits while its successor takes its place.
pub(super) fn previous_path(dir: &Path) -> PathBuf {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    dir.with_file_name(format!(".{name}.previous"))
}

fn absolute(source: &str) -> String {
    match Path::new(source).canonicalize() {
        Ok(path) => path.to_string_lossy().into_owned(),
        Err(_) => source.to_owned(),
    }
}

fn dtype_name(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float32"),
        DType::BF16 => Ok("bfloat16"),
        DType::F16 => Ok("float16"),
        other => Err(ModelError::Invalid(format!(
            "students are saved as f32, bf16 or f16, not {}",
            other.as_str()
        ))),
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| ModelError::Invalid(error.to_string()))
}
