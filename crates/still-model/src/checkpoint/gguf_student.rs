//! Students with quantized weights, in one GGUF file.
//!
//! The file is a student's directory in another container: tensors under Hugging Face's names and in its order, `config.json`,
//! `tokenizer.json` and `tokenizer_config.json` as metadata. Its architecture is called "still", so that programs that know only
//! softmax attention refuse it instead of running something else.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::str::FromStr;

use candle_core::DType;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};

use super::form::{self, Form, student_config};
use super::gguf::Metadata;
use super::safetensors_dir::in_file;
use super::student::{learned_entries, merged_entries};
use super::weights::GgufLayout;
use super::{Checkpoint, Weights};
use crate::base::BaseIdentity;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::files::write_file_with;
use crate::model::Model;
use crate::seal::{self, Kind};
use crate::tokenizer::Tokenizer;

const ARCHITECTURE_KEY: &str = "general.architecture";
const ARCHITECTURE: &str = "still";
const CONFIG_KEY: &str = "still.config";
const TOKENIZER_KEY: &str = "tokenizer.huggingface.json";
const GENERATION_CONFIG_KEY: &str = "still.generation_config";
const TOKENIZER_CONFIG_KEY: &str = "still.tokenizer_config";

/// Number format of a quantized student's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names are GGUF's own")]
pub enum GgufFormat {
    /// 8 bits and a scale for each 32 values.
    Q8_0,
    /// 4 bits, a scale and a minimum for each 32 values.
    Q4_1,
    /// 4 bits; 256 values share a scale and a minimum, which each 32 of them refine.
    Q4K,
}

impl GgufFormat {
    /// Every format, from the most bits to the fewest.
    pub const ALL: [Self; 3] = [Self::Q8_0, Self::Q4_1, Self::Q4K];

    /// GGUF's own name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_1 => "q4_1",
            Self::Q4K => "q4_k",
        }
    }

    /// The fewest bytes that so many values may take: those of whole blocks.
    pub fn bytes(self, values: u64) -> u64 {
        let dtype = match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            // Rows that are no whole blocks of Q4_K take the other.
            Self::Q4_1 | Self::Q4K => GgmlDType::Q4K,
        };
        values.saturating_mul(dtype.type_size() as u64) / dtype.block_size() as u64
    }

    /// The format that a matrix should have. The vocabulary, which errors reach undiluted, has 8 bits.
    fn of(self, name: &str) -> GgmlDType {
        match self {
            _ if matches!(name, "model.embed_tokens.weight" | "lm_head.weight") => GgmlDType::Q8_0,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q4K => GgmlDType::Q4K,
        }
    }
}

impl fmt::Display for GgufFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for GgufFormat {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            ModelError::NotFound {
                what: format!("no format of quantized weights is called {name:?}"),
                hint: format!("use one of {}", Self::ALL.map(Self::name).join(", ")),
            }
        })
    }
}

/// The format that rows of so many values take: the one asked for, or the next whose blocks fit, of no fewer bits.
fn fitting(wanted: GgmlDType, columns: usize) -> GgmlDType {
    [wanted, GgmlDType::Q4_1]
        .into_iter()
        .find(|dtype| columns.is_multiple_of(dtype.block_size()))
        .unwrap_or(GgmlDType::BF16)
}

/// What a quantized student's file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufExport {
    /// Matrices by the name of their format.
    pub matrices: BTreeMap<String, usize>,
    /// Those whose rows are no whole blocks of the format that was asked for.
    pub other_format: usize,
    /// Size of the file.
    pub bytes: u64,
}

/// Saves a student with its low-rank updates merged and its matrices quantized; what stood at `path` is replaced only once the
/// new file is complete. Norms, biases and what the attention learned stay f32.
///
/// # Errors
/// A model without a student, a path without `.gguf`, a full disk.
pub fn export_gguf(path: &Path, model: &Model, format: GgufFormat) -> Result<GgufExport> {
    let student = model.student.as_ref().ok_or_else(|| {
        ModelError::Invalid("a model without a student has nothing to export".into())
    })?;
    if path.extension().is_none_or(|extension| extension != "gguf") {
        return Err(ModelError::NotFound {
            what: format!("{} is not the name of a GGUF file", path.display()),
            hint: "choose a name that ends in .gguf: it is what tells the file's format".into(),
        });
    }
    let mut export = GgufExport { matrices: BTreeMap::new(), other_format: 0, bytes: 0 };
    let mut tensors = Vec::new();
    // One at a time: the wide values of a whole model take many times the file's memory.
    for entry in merged_entries(model, student, DType::F32)? {
        let tensor = entry.tensor()?;
        let dtype = match tensor.dims() {
            &[_, columns] => {
                let wanted = format.of(entry.name());
                let dtype = fitting(wanted, columns);
                *export.matrices.entry(format!("{dtype:?}")).or_default() += 1;
                export.other_format += usize::from(dtype != wanted);
                dtype
            }
            _ => GgmlDType::F32,
        };
        tensors.push((entry.name().to_owned(), QTensor::quantize(&tensor, dtype)?));
    }
    for entry in learned_entries(&student.without_updates()?)? {
        let tensor = QTensor::quantize(&entry.tensor()?, GgmlDType::F32)?;
        tensors.push((entry.name().to_owned(), tensor));
    }

    let (tokenizer, tokenizer_config) = model.tokenizer.to_json()?;
    let metadata = [
        (ARCHITECTURE_KEY, ARCHITECTURE.to_owned()),
        // Near the beginning, where it is looked for.
        (seal::GGUF_KEY, seal::BLANK.to_owned()),
        (CONFIG_KEY, student_config(model.config(), student)?.to_string()),
        (TOKENIZER_KEY, tokenizer),
        (TOKENIZER_CONFIG_KEY, tokenizer_config.to_string()),
    ];
    let generation = model.base.generation_config.as_ref();
    let generation = generation.map(|generation| (GENERATION_CONFIG_KEY, generation.to_string()));
    let metadata: Vec<_> = (metadata.into_iter().chain(generation))
        .map(|(key, text)| (key, Value::String(text)))
        .collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let write = |file: &mut BufWriter<&File>| {
        gguf_file::write(file, &metadata, &tensors).map_err(|error| match error {
            candle_core::Error::Io(error) => error,
            other => io::Error::other(other.to_string()),
        })
    };
    write_file_with(path, write, |file| seal::seal(file, Kind::Gguf))
        .map_err(ModelError::write(path))?;
    export.bytes = path.metadata().map_err(ModelError::read(path))?.len();
    Ok(export)
}

/// Whether a GGUF file is a student's own.
pub(super) fn is_student(content: &Content) -> bool {
    matches!(content.metadata.get(ARCHITECTURE_KEY), Some(Value::String(name)) if name == ARCHITECTURE)
}

/// Whether a file is one that [`export_gguf`] wrote.
pub fn is_exported_student(path: &Path) -> bool {
    super::gguf::open(path).is_ok_and(|content| is_student(&content))
}

/// Opens a file that [`export_gguf`] wrote.
pub(super) fn open(source: &str, path: &Path, content: Content) -> Result<Checkpoint> {
    let metadata = Metadata::new(path, &content);
    let required = |key: &str| metadata.required(key, metadata.text(key)?);
    let json = |key: &str| {
        serde_json::from_str(required(key)?)
            .map_err(|error| ModelError::corrupt(path, format!("{key} is not JSON: {error}")))
    };
    let Form::Student(student) = form::of(json(CONFIG_KEY)?, path)? else {
        return Err(ModelError::corrupt(path, format!("{CONFIG_KEY} does not describe a student")));
    };
    check_digest(path, student.sealed)?;
    let mut config =
        ModelConfig::from_hf_json(&student.base_config).map_err(|error| in_file(error, path))?;
    let generation_config =
        metadata.text(GENERATION_CONFIG_KEY)?.map(|_| json(GENERATION_CONFIG_KEY)).transpose()?;
    if let Some(generation) = &generation_config {
        config.add_end_tokens(generation).map_err(|error| in_file(error, path))?;
    }
    student.check(&config, path)?;
    let tokenizer_config = json(TOKENIZER_CONFIG_KEY)?;
    let tokenizer =
        Tokenizer::from_json(required(TOKENIZER_KEY)?.as_bytes(), tokenizer_config, path)?;
    Ok(Checkpoint {
        config,
        weights: Weights::from_gguf(path, content, GgufLayout::HuggingFace)?,
        tokenizer,
        still: Some(student.still),
        lora: None,
        recipe: student.recipe,
        base: BaseIdentity {
            source: source.to_owned(),
            files: vec![path.to_path_buf()],
            generation_config,
        },
    })
}

/// An error unless the file is what was written; older files have no digest.
fn check_digest(path: &Path, sealed: bool) -> Result<()> {
    let file = File::open(path).map_err(ModelError::read(path))?;
    // SAFETY: the map is read-only and ends with this function; nobody cuts the file short meanwhile.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::read(path))?;
    seal::expect(path, &map, Kind::Gguf, sealed)
}
