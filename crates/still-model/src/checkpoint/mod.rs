//! Models on disk: Hugging Face directories, GGUF files, hub ids and students.
//!
//! | file | content |
//! |---|---|
//! | `source` | finds the files of what a user names |
//! | `fetching` | files of a hub, from its cache or fetched; progress |
//! | `hub` | models, adapters and deltas fetched from a hub |
//! | `built_in` | built-in models: the pinned base, the student that ships |
//! | `cached` | the contents of the caches, and their sizes |
//! | `hub_dataset` | datasets, likewise |
//! | `safetensors_dir` | directories with `config.json` |
//! | `form` | the kind of a `config.json`: a base, a student, a checkpoint of STILL's authors |
//! | `authors` | checkpoints and adapters of STILL's authors |
//! | `gguf` | GGUF files of base models, read and checked |
//! | `gguf_student` | GGUF files of students, read and written |
//! | `names` | tensor names of Hugging Face and GGUF, by family |
//! | `learned`, `learned_names` | learned tensors and their names |
//! | `shapes` | the tensors of a model |
//! | `weights` | tensors by name, whatever file they come from |
//! | `safetensors_file` | safetensors files, mapped into memory |
//! | `quantization`, `dequantize` | 8-bit weights of safetensors: schemes and values |
//! | `unread` | refuses a model with tensors that were not read |
//! | `delta` | the base of a delta |
//! | `load` | from an opened checkpoint to a model |
//! | `placement` | the format of matrices on a device |
//! | `student`, `target` | saves students; checks and locks their directory |
//! | `transformers` | the files by which transformers opens a full student |

mod authors;
mod built_in;
mod cached;
mod delta;
mod dequantize;
mod fetching;
mod form;
pub mod gguf;
mod gguf_student;
mod hub;
mod hub_dataset;
mod learned;
mod learned_names;
mod load;
pub mod names;
mod placement;
mod quantization;
mod safetensors_dir;
mod safetensors_file;
mod shapes;
mod source;
mod student;
mod target;
mod transformers;
mod unread;
mod weights;

use std::path::Path;

use still_attention::StillConfig;

pub use built_in::{DEMO_STUDENT, PINNED_BASE, built_in_names, is_built_in};
pub use cached::{Cached, CachedKind, cached, hub_cache_dir};
pub use fetching::{Fetched, OnFetch};
pub use gguf_student::{GgufExport, GgufFormat, export_gguf, is_exported_student};
pub use hub_dataset::fetch_dataset;
pub use placement::WeightFormat;
pub(crate) use shapes::shapes;
pub use student::{ExportKind, FullStudent, export_transformers, save_student, save_student_to};
pub use target::StudentTarget;
pub use weights::Weights;

use self::weights::GgufLayout;
use crate::base::BaseIdentity;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::student::LoraConfig;
use crate::tokenizer::Tokenizer;

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

/// What a model is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Any,
    /// To be the base of a delta.
    Base,
}

impl Role {
    /// An error if a delta is found where a base is needed.
    fn admit_delta(self, path: &Path) -> Result<()> {
        match self {
            Self::Any => Ok(()),
            Self::Base => Err(ModelError::corrupt(
                path,
                "is a delta itself, and the base of a delta must have all its weights",
            )),
        }
    }
}

impl Checkpoint {
    /// Opens a Hugging Face directory, a `.gguf` file, a hub id (`org/name`) or a student.
    ///
    /// # Errors
    /// What is missing, broken or unsupported, by name.
    pub fn open(model: &str) -> Result<Self> {
        Self::open_with_progress(model, &OnFetch::default())
    }

    /// [`Checkpoint::open`], which tells of what it fetches from a hub.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with_progress(model: &str, on_fetch: &OnFetch) -> Result<Self> {
        Self::open_as(model, Role::Any, on_fetch)
    }

    /// [`Checkpoint::open`] for the base of a delta: another delta is refused before its own base is looked for, so that a delta of
    /// itself comes to an end. A student with all its weights will do: the delta's attention takes the place of its own.
    fn open_base(model: &str, on_fetch: &OnFetch) -> Result<Self> {
        Self::open_as(model, Role::Base, on_fetch)
    }

    fn open_as(model: &str, role: Role, on_fetch: &OnFetch) -> Result<Self> {
        match source::resolve(model, on_fetch)? {
            source::Source::Gguf(path) => Self::open_gguf(model, &path),
            source::Source::Directory(dir) => safetensors_dir::open(model, &dir, role, on_fetch),
        }
    }

    fn open_gguf(source: &str, path: &Path) -> Result<Self> {
        let content = gguf::open(path)?;
        if gguf_student::is_student(&content) {
            return gguf_student::open(source, path, content);
        }
        let config = gguf::config(path, &content)?;
        let tokenizer = Tokenizer::from_gguf(path, &content)?;
        let generation_config = gguf::generation_config(path, &content)?;
        let weights =
            Weights::from_gguf(path, content, GgufLayout::LlamaCpp(Box::new(config.clone())))?;
        Ok(Self {
            config,
            weights,
            tokenizer,
            still: None,
            lora: None,
            recipe: None,
            base: BaseIdentity {
                source: source.to_owned(),
                files: vec![path.to_path_buf()],
                generation_config,
            },
        })
    }
}
