//! Load a model and continue a text.
//!
//! `cargo run --release -p still-model --example generate MODEL 'The ship left'`: a directory, a `.gguf` file, a hub id or a student.

use std::io::Write;
use std::ops::ControlFlow;

use still_attention::RowDtype;
use still_model::random::{random_model, tiny_config};
use still_model::{GenerateOptions, Generation, Model, Result, generate};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = match arguments.next() {
        Some(model) => Model::load(&model)?,
        // It writes noise.
        None => random_model(tiny_config(), 0)?,
    };
    let prompt = arguments.next().unwrap_or_else(|| "The ship left on".into());
    let text = continue_text(&model, &prompt, &mut std::io::stdout())?;
    println!("\n{} tokens", text.ids.len());
    Ok(())
}

/// Writes what a model says after `prompt`, piece by piece.
pub fn continue_text(model: &Model, prompt: &str, out: &mut dyn Write) -> Result<Generation> {
    let ids = model.tokenizer.encode(prompt, true)?;
    let mut cache = model.new_cache(1, model.cache_rows(RowDtype::Bf16))?;
    let options = GenerateOptions { max_new_tokens: 32, ..GenerateOptions::default() };
    generate(model, &ids, &mut cache, &options, &mut |text| {
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()), // nobody reads it any more
        }
    })
}
