//! Models from outside, a module a subject. One executable: each would link the decoder again. What is run by name while a
//! decoder changes (`parity`, `families`, `readme`) and what needs a process to itself (`steady_state`'s allocator, `token_streams`' clock,
//! `cuda`) are executables of their own.

#[path = "../common/mod.rs"]
mod common;

mod authors;
mod caches;
mod chat_parity;
mod chat_templates;
mod checkpoints;
mod configurations;
mod decode_many;
mod examples;
mod generate_together;
mod generation_ends;
mod gguf_directory;
mod gguf_errors;
mod hostile_tokenizers;
mod read_packed;
mod sessions;
mod smollm2;
mod students_on_disk;
mod tensor_files;
mod tokenizers;
mod transformers;
mod weight_formats;
