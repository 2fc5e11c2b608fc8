//! Students on disk.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::delta;
use super::form::{BASE_KEY, LORA_KEY, student_config, to_json};
use super::target::{DELTA_FILE, GENERATION_FILE, StudentTarget, TOKENIZER_CONFIG_FILE};
use super::transformers::{self, CARD_FILE, CLASSES_KEY};
use crate::config::ModelConfig;
use crate::decoder::{Part, on_host};
use crate::error::{ModelError, Result};
use crate::files::sync_files;
use crate::model::Model;
use crate::student::Student;
use crate::tensor_file::{Entry, write_tensors};
use crate::tokenizer::Tokenizer;

/// The form of a saved student.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// All weights, low-rank updates merged, in this dtype (learned attention tensors stay f32), and the code that transformers
    /// opens it with.
    Full(DType),
    /// Only what differs from the base, which is named and hashed.
    Delta,
    /// [`ExportKind::Delta`] with learned matrices in this dtype, f16 or bf16: half the bytes. Other learned tensors stay f32.
    DeltaIn(DType),
}

impl ExportKind {
    /// Whether the base's weights are left out.
    pub fn is_delta(self) -> bool {
        matches!(self, Self::Delta | Self::DeltaIn(_))
    }
}

/// Saves a student. A student in the same place is replaced only when the new one is complete.
///
/// # Errors
/// A model without a student, a target that is something else, a full disk.
pub fn save_student(dir: &Path, model: &Model, kind: ExportKind) -> Result<()> {
    save_student_to(&StudentTarget::claim(dir)?, model, kind)
}

/// [`save_student`] into a directory that the caller has claimed.
///
/// # Errors
/// As [`save_student`].
pub fn save_student_to(target: &StudentTarget, model: &Model, kind: ExportKind) -> Result<()> {
    save(target, model, kind, None)
}

/// Saves a full student, weights in `dtype`, as a folder that can be shared as it is: with a model card (Markdown).
///
/// # Errors
/// As [`save_student`].
pub fn export_transformers(
    target: &StudentTarget,
    model: &Model,
    dtype: DType,
    card: &str,
) -> Result<()> {
    save(target, model, ExportKind::Full(dtype), Some(card))
}

fn save(target: &StudentTarget, model: &Model, kind: ExportKind, card: Option<&str>) -> Result<()> {
    let student = model.student.as_ref().ok_or_else(|| {
        ModelError::Invalid("a model without a student has nothing to save".into())
    })?;
    let staging = target.stage()?;
    match kind {
        ExportKind::Full(dtype) => {
            let path = staging.path().join("model.safetensors");
            let mut entries =
                transformers::as_stored(model.config(), merged_entries(model, student, dtype)?);
            entries.extend(learned_entries(&student.without_updates()?)?);
            write_tensors(&path, entries)?;
            let generation = model.base.generation_config.as_ref();
            let all_but_weights = FullStudent {
                config: model.config(),
                student,
                tokenizer: &model.tokenizer,
                generation,
                dtype,
            };
            all_but_weights.write(staging.path())?;
        }
        ExportKind::Delta | ExportKind::DeltaIn(_) => {
            model.tokenizer.save(staging.path())?;
            let mut config = student_config(model.config(), student)?;
            config[BASE_KEY] = delta::record(target.dir(), model)?;
            if let Some(lora) = &student.lora {
                config[LORA_KEY] = to_json(lora)?;
            }
            let entries = match kind {
                ExportKind::DeltaIn(dtype) => {
                    dtype_name(dtype)?;
                    rounded_entries(student, dtype)?
                }
                _ => learned_entries(student)?,
            };
            write_tensors(&staging.path().join(DELTA_FILE), entries)?;
            write(staging.path(), "config.json", &pretty(&config))?;
        }
    }
    if let Some(card) = card {
        write(staging.path(), CARD_FILE, &transformers::marked_card(card))?;
    }
    sync_files(staging.path()).map_err(ModelError::write(staging.path()))?;
    target.replace(staging)
}

/// The weights of a student's base in `dtype`, on the CPU, with its low-rank updates merged in f32. Each is made when it is asked
/// for, so that one merged matrix is held at a time.
pub(super) fn merged_entries<'a>(
    model: &'a Model,
    student: &'a Student,
    dtype: DType,
) -> Result<Vec<Entry<'a>>> {
    let mut updates = student.updates();
    let weights = model.decoder.parts().into_iter().map(|(name, part)| {
        let lora = updates.remove(&name);
        let values = move || {
            let wide = match (part, lora) {
                (Part::Matrix(weight), Some(lora)) => lora.added_to(weight)?,
                _ => on_host(&part.to_tensor()?)?,
            };
            Ok(wide.to_dtype(dtype)?)
        };
        Ok(Entry::new(name, dtype, part.dims()?, values))
    });
    let entries = weights.collect::<Result<Vec<_>>>()?;
    if let Some(name) = updates.keys().next() {
        return Err(ModelError::Invalid(format!("there is no weight {name} to merge into")));
    }
    Ok(entries)
}

/// A student's learned tensors, on the CPU, in f32.
pub(super) fn learned_entries(student: &Student) -> Result<Vec<Entry<'static>>> {
    let learned = student.to_device(&Device::Cpu)?.checkpoint_tensors()?;
    Ok(learned.into_iter().map(|(name, tensor)| Entry::of(name, tensor)).collect())
}

/// [`learned_entries`] with matrices in `dtype`.
///
/// # Errors
/// A value that `dtype` does not hold.
fn rounded_entries(student: &Student, dtype: DType) -> Result<Vec<Entry<'static>>> {
    let learned = student.to_device(&Device::Cpu)?.checkpoint_tensors()?;
    let rounded = learned.into_iter().map(|(name, tensor)| {
        if tensor.rank() < 2 {
            return Ok(Entry::of(name, tensor));
        }
        let rounded = tensor.to_dtype(dtype)?;
        let values = rounded.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(ModelError::Invalid(format!(
                "{name} has a value that {} does not hold",
                dtype.as_str()
            )));
        }
        Ok(Entry::of(name, rounded))
    });
    rounded.collect()
}

/// The folder of a full student, but for its weights (`model.safetensors`).
#[derive(Clone, Copy, Debug)]
pub struct FullStudent<'a> {
    /// The base's.
    pub config: &'a ModelConfig,
    /// Its attention and recipe; low-rank updates are merged in the weights.
    pub student: &'a Student,
    /// The base's.
    pub tokenizer: &'a Tokenizer,
    /// The base's `generation_config.json`, if it has one.
    pub generation: Option<&'a Value>,
    /// Of the base's weights in the file.
    pub dtype: DType,
}

impl FullStudent<'_> {
    /// Writes configuration, tokenizer and the code that transformers opens it with into a directory.
    ///
    /// # Errors
    /// A dtype that no student is saved in; a directory that cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        self.tokenizer.save(dir)?;
        let mut config = student_config(self.config, self.student)?;
        config["torch_dtype"] = json!(dtype_name(self.dtype)?);
        config[CLASSES_KEY] = transformers::classes();
        if let Some(generation) = self.generation {
            write(dir, GENERATION_FILE, &pretty(generation))?;
        }
        let (_, tokenizer) = self.tokenizer.to_json()?;
        let tokenizer = transformers::tokenizer_config(tokenizer, self.config, self.tokenizer);
        write(dir, TOKENIZER_CONFIG_FILE, &pretty(&tokenizer))?;
        transformers::write_code(dir)?;
        write(dir, "config.json", &pretty(&config))
    }
}

fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    let path = dir.join(name);
    std::fs::write(&path, text).map_err(ModelError::write(&path))
}

fn pretty(json: &Value) -> String {
    format!("{json:#}\n")
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
