//! `still generate`: continue a prompt, streaming.

use std::io::IsTerminal;

use serde_json::json;
use still_attention::RowDtype;
use still_model::{Finish, Generation, generate};

use super::{load, read_piped, read_text_once, row_dtype, sampling, stream_to};
use crate::args::GenerateArgs;
use crate::errors::{Interrupted, user};
use crate::interrupt::{self, OnSignal};
use crate::printer::Printer;
use crate::table;

/// Runs the command.
pub fn run(args: &GenerateArgs, printer: &Printer) -> anyhow::Result<()> {
    let options = sampling(&args.sampling)?;
    let prompt = prompt(args, printer)?;
    let model = load(&args.model.model, &args.device, printer)?;
    let ids = model.tokenizer.encode(&prompt, true)?;
    if ids.is_empty() {
        return Err(user("the prompt has no tokens", "give some text to continue"));
    }
    let rows = row_dtype(args.sampling.cache_dtype, RowDtype::Bf16, &model);
    let mut cache = model.new_cache(1, rows)?;
    interrupt::on_signal(OnSignal::Finish);
    let mut written = Ok(());
    let mut stream = stream_to(printer, !args.json, &mut written);
    let generation = generate(&model, &ids, &mut cache, &options, &mut stream)?;
    drop(stream);
    written?;
    if let Some(warning) = &generation.warning {
        printer.warn(warning);
    }
    if args.json {
        printer.json(&json!({
            "text": generation.text,
            "finish": finish_word(&generation.finish),
            "prompt_tokens": ids.len(),
            "new_tokens": generation.ids.len(),
            "prefill_seconds": generation.prefill_seconds,
            "decode_seconds": generation.decode_seconds,
            "cache_bytes": cache.size_bytes(),
            "warning": generation.warning,
        }))?;
    } else {
        printer.stream("\n")?;
        printer.note(summary(&generation, ids.len(), cache.size_bytes()));
    }
    match generation.finish {
        Finish::Interrupted => Err(Interrupted.into()),
        _ => Ok(()),
    }
}

fn prompt(args: &GenerateArgs, printer: &Printer) -> anyhow::Result<String> {
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    }
    if let Some(path) = &args.prompt_file {
        return read_text_once(path, printer);
    }
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        printer.note("reading the prompt from the terminal; end it with Ctrl-D");
    }
    read_piped(stdin.lock(), "standard input")
}

/// One line about speed and cache.
pub fn summary(generation: &Generation, read: usize, cache_bytes: usize) -> String {
    let new = generation.ids.len();
    format!(
        "{read} tokens read at {:.0}/s, {new} written at {:.1}/s, cache {}; ended by {}",
        read as f64 / generation.prefill_seconds.max(1e-9),
        new as f64 / generation.decode_seconds.max(1e-9),
        table::bytes(cache_bytes),
        finish_phrase(&generation.finish),
    )
}

fn finish_word(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndOfSequence => "end_of_sequence",
        Finish::StopString => "stop",
        Finish::Length => "length",
        Finish::Interrupted => "interrupted",
    }
}

fn finish_phrase(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndOfSequence => "the model",
        Finish::StopString => "a stop string",
        Finish::Length => "--max-new-tokens",
        Finish::Interrupted => "Ctrl-C",
    }
}
