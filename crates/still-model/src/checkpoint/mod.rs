//! Models on disk: Hugging Face directories, GGUF files, hub ids and students.

mod authors;
pub mod gguf;
mod gguf_student;
pub(crate) mod learned_names;
pub mod names;
mod safetensors_dir;
mod source;
mod student;
mod weights;

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use still_attention::StillConfig;

pub use gguf_student::{GgufExport, GgufFormat, export_gguf};
pub use student::{ExportKind, save_student};
pub use weights::Weights;

use self::weights::GgufLayout;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::student::LoraConfig;
use crate::tokenizer::Tokenizer;

/// Where a base model's weights came from.
#[derive(Clone, Debug)]
pub struct BaseIdentity {
    /// What the user named: a path or a hub id.
    pub source: String,
    /// The weight files, in order; empty for a model made in memory.
    pub files: Vec<PathBuf>,
}

impl BaseIdentity {
    /// SHA-256 over the weight files' bytes, in hexadecimal.
    ///
    /// # Errors
    /// An unreadable file.
    pub fn sha256(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        for path in &self.files {
            let mut file = std::fs::File::open(path).map_err(ModelError::read(path))?;
            std::io::copy(&mut file, &mut hasher).map_err(ModelError::read(path))?;
        }
        Ok(format!("{:x}", hasher.finalize()))
    }
}

/// An opened model: everything but the loading of its weights.
#[derive(Debug)]
pub struct Checkpoint {
    /// The base model's hyper-parameters.
    pub config: ModelConfig,
    /// Base weights and, of a student, its learned tensors.
    pub weights: Weights,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The attention of a student.
    pub still: Option<StillConfig>,
    /// Unmerged updates of a delta student.
    pub lora: Option<LoraConfig>,
    /// The recipe that made a student.
    pub recipe: Option<serde_json::Value>,
    /// Where the base weights came from.
    pub base: BaseIdentity,
}

impl Checkpoint {
    /// Opens a Hugging Face directory, a `.gguf` file, a hub id (`org/name`) or a student.
    ///
    /// # Errors
    /// What is missing, broken or unsupported, by name.
    pub fn open(model: &str) -> Result<Self> {
        match source::resolve(model)? {
            source::Source::Gguf(path) => Self::open_gguf(model, &path),
            source::Source::Directory(dir) => safetensors_dir::open(model, &dir),
        }
    }

    fn open_gguf(source: &str, path: &Path) -> Result<Self> {
        let content = gguf::open(path)?;
        if gguf_student::is_student(&content) {
            return gguf_student::open(source, path, content);
        }
        let config = gguf::config(path, &content)?;
        let tokenizer = Tokenizer::from_gguf(path, &content)?;
        let weights = Weights::from_gguf(path, content, GgufLayout::LlamaCpp(config.clone()))?;
        Ok(Self {
            config,
            weights,
            tokenizer,
            still: None,
            lora: None,
            recipe: None,
            base: BaseIdentity { source: source.to_owned(), files: vec![path.to_path_buf()] },
        })
    }
}
