#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `model` | a model that runs: decoder, student, tokenizer |
//! | `decoder` | embeddings, layers, norms, head; a layer's operations, with and without a graph |
//! | `student` | a student's learned tensors |
//! | `visit` | one pass through all layers; the caller computes the attention |
//! | `config` | hyper-parameters, and what sets families apart |
//! | `checkpoint` | models on disk: safetensors, GGUF, hub, students |
//! | `base` | the identity of a base: how a delta recognizes it |
//! | `executor` | how each device runs prefill and decode steps |
//! | `cache` | the attention states of a batch of sequences |
//! | `read` | prefill of one sequence |
//! | `read_packed` | prefill of several sequences |
//! | `generate`, `sampler` | generation of one sequence; sampling of a token |
//! | `continuation` | the text of a generation as it grows, and what ends it |
//! | `suggested` | sampling options that a model's files suggest |
//! | `generate_together` | greedy generation of several sequences |
//! | `session` | conversations that keep their state, in memory and in a file |
//! | `chat` | chat templates |
//! | `tokenizer` | text to ids and back |
//! | `files` | atomic writes: a file is complete or absent |
//! | `tensor_file`, `seal` | safetensors written tensor by tensor; digests in files |
//! | `fetch` | the model that the demo and tests fetch |
//! | `random` | small random models |
//! | `device` | devices by name |
//! | `cancel` | cancellation from another thread |
//! | `error` | errors of loading, running and saving |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod base;
mod cache;
mod cancel;
mod chat;
mod checkpoint;
mod config;
mod continuation;
pub mod decoder;
mod device;
mod error;
mod executor;
pub mod fetch;
pub mod files;
mod generate;
mod generate_together;
mod model;
pub mod random;
mod read;
mod read_packed;
mod sampler;
pub mod seal;
mod session;
mod student;
mod suggested;
pub mod tensor_file;
mod tokenizer;
mod visit;

pub use base::BaseIdentity;
pub use cache::{Cache, Workspace};
pub use cancel::Cancel;
pub use chat::{ChatTemplate, Context, Message, Rendered};
pub use checkpoint::{
    Cached, CachedKind, Checkpoint, DEMO_STUDENT, ExportKind, Fetched, FullStudent, GgufExport,
    GgufFormat, OnFetch, PINNED_BASE, StudentTarget, WeightFormat, Weights, built_in_names, cached,
    export_gguf, export_transformers, fetch_dataset, hub_cache_dir, is_built_in,
    is_exported_student, names, save_student, save_student_to,
};
pub use config::{Activation, Architecture, ModelConfig, RopeScaling, SlidingAttention};
pub use continuation::{Continuation, Pushed};
pub use decoder::{
    AttentionInputs, Decoder, DecoderLayer, Dropout, LayerOps, Linear, Lora, LoraLayer, Norm,
    NormWeight, Part, Projected, Projection, QuantizedMatrix, Role, RopeBase, Rotation,
    SavedActivations, SavingOps, StudentLayer, TensorOps, Value, Weight,
};
pub use device::{device, peak_device_bytes, reset_peak_device_bytes};
pub use error::{ModelError, Result};
pub use executor::{Batching, lanes, usual_dtype};
pub use generate::{Finish, GenerateOptions, Generation, generate};
pub use generate_together::generate_together;
pub use model::Model;
pub use read::OnRead;
pub use read_packed::Feed;
pub use sampler::{Constraint, Constraints, Sampler, any_nan, likeliest};
pub use session::{ChatSession, Reply, SavedSequence, message_about};
pub use student::{FeatureInit, LoraConfig, LoraTarget, Student};
pub use suggested::SuggestedSampling;
pub use tokenizer::{Span, TokenStream, Tokenizer, panics_are_expected};
