//! `still generate`: continue a prompt, streaming.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use still_model::{Finish, Generation, generate};

use super::generation::{GenerationArgs, GenerationSettings};
use super::input::{read_piped, read_text_once};
use super::sampling::Usual;
use super::stream_to;
use crate::errors::{Interrupted, user};
use crate::interrupt::{self, OnSignal};
use crate::printer::Printer;
use crate::progress::{Bar, ReadingBar};
use crate::table;

const EXAMPLES: &str = "\
Examples:
  still generate --model my-student --prompt 'Once upon a time' -n 200
  still generate --model org/name --prompt-file chapter.txt --temperature 0.7
  still generate --model my-student.gguf --prompt 'The sea' --json
  still generate --model org/name --prompt 'As JSON: ' --json-schema a.json";

/// `still generate`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct GenerateArgs {
    /// Text to continue; standard input without this and --prompt-file
    #[arg(long, short, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// File to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    json: bool,
    /// Who continues, and how.
    #[command(flatten)]
    generation: GenerationArgs,
}

/// What is generated.
#[derive(Debug)]
pub struct Settings {
    generation: GenerationSettings,
    prompt: Prompt,
    json: bool,
}

/// Where the prompt is.
#[derive(Debug)]
enum Prompt {
    Text(String),
    File(PathBuf),
    StandardInput,
}

impl GenerateArgs {
    /// # Errors
    /// Options that contradict each other; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        Ok(Settings {
            generation: self.generation.resolve(Usual::Greedy)?,
            prompt: match (self.prompt, self.prompt_file) {
                (Some(text), _) => Prompt::Text(text),
                (None, Some(path)) => Prompt::File(path),
                (None, None) => Prompt::StandardInput,
            },
            json: self.json,
        })
    }
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let prompt = settings.prompt.read(printer)?;
    let model = settings.generation.load(printer)?;
    let bar = Bar::new(printer, "Reading", "the prompt", 0, "");
    let ids = model.tokenizer.encode(&prompt, true)?;
    drop(bar);
    if ids.is_empty() {
        return Err(user("the prompt has no tokens", "give some text to continue"));
    }
    let mut options = settings.generation.options(&model)?;
    let trained = model.config().max_position_embeddings;
    options.on_read = ReadingBar::of_prompt(printer).within(trained).listener();
    let rows = settings.generation.rows.told(&model, printer);
    let mut cache = model.new_cache(1, rows)?;
    interrupt::on_signal(OnSignal::Finish);
    let mut written = Ok(());
    let mut stream = stream_to(printer, !settings.json, &mut written);
    let generation = generate(&model, &ids, &mut cache, &options, &mut stream)?;
    drop(stream);
    written?;
    if !settings.json {
        printer.stream("\n")?;
    }
    if let Some(warning) = &generation.warning {
        printer.warn(warning);
    }
    if settings.json {
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
        printer.note(summary(&generation, ids.len(), cache.size_bytes()));
    }
    match generation.finish {
        Finish::Interrupted => Err(Interrupted.into()),
        _ => Ok(()),
    }
}

impl Prompt {
    fn read(&self, printer: &Printer) -> anyhow::Result<String> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::File(path) => read_text_once(path, printer),
            Self::StandardInput => {
                let stdin = std::io::stdin();
                if stdin.is_terminal() {
                    printer.note("reading the prompt from the terminal; end it with Ctrl-D");
                }
                read_piped(stdin.lock(), "standard input")
            }
        }
    }
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

/// Why it ended, for programs.
pub fn finish_word(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndOfSequence => "end_of_sequence",
        Finish::StopString => "stop",
        Finish::Length => "length",
        Finish::Interrupted => "interrupted",
    }
}

/// What ended it, for people.
pub fn finish_phrase(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndOfSequence => "the model",
        Finish::StopString => "a stop string",
        Finish::Length => "--max-new-tokens",
        Finish::Interrupted => "Ctrl-C",
    }
}
