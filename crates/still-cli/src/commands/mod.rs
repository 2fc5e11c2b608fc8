//! One module per command.

pub mod bench;
pub mod calibrate;
mod calibration_bars;
pub mod chat;
pub mod demo;
pub mod doctor;
mod dry_run;
pub mod eval;
pub mod export;
pub mod generate;
pub mod inspect;
pub mod linearize;
mod observer;
mod places;
pub mod report;

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{DType, Device};
use still_attention::RowDtype;
use still_model::{GenerateOptions, Model, files};
use still_train::Recipe;

use crate::args::{CacheDtype, ComputeDtype, DeviceArgs, SamplingArgs};
use crate::errors::user;
use crate::interrupt;
use crate::printer::{Printer, Written};

/// Chunk length of the students that commands make without a recipe.
const CHUNK: usize = 64;
/// Salient tokens that they keep of each chunk.
const BUDGET: usize = 4;

/// The device that was asked for, and the dtype of base weights and activations there.
fn place(args: &DeviceArgs) -> anyhow::Result<(Device, DType)> {
    let device = still_model::device(&args.device)?;
    let dtype = match args.compute_dtype {
        Some(ComputeDtype::F32) => DType::F32,
        Some(ComputeDtype::Bf16) => DType::BF16,
        None if device.is_cpu() => DType::F32,
        None => DType::BF16,
    };
    Ok((device, dtype))
}

/// Loads a model onto its device and says which one.
fn load(model: &str, device: &DeviceArgs, printer: &Printer) -> anyhow::Result<Model> {
    let (device, dtype) = place(device)?;
    printer.step("Loading", model);
    let model = Model::load_on(model, &device, dtype)?;
    let config = &model.decoder.config;
    printer.step(
        "Loaded",
        format_args!(
            "{} layers, {} query and {} key/value heads of {}, {}",
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            if model.student.is_some() { "STILL attention" } else { "softmax attention" },
        ),
    );
    Ok(model)
}

/// Loads a model that is no student yet; `verb` says what is to be done with it.
fn load_base(
    model: &str,
    device: &DeviceArgs,
    verb: &str,
    printer: &Printer,
) -> anyhow::Result<Model> {
    let loaded = load(model, device, printer)?;
    if loaded.student.is_some() {
        return Err(user(
            format!("{model} is a student already"),
            format!("{verb} the base model that it came from"),
        ));
    }
    Ok(loaded)
}

/// Reads a recipe, or takes the defaults, and applies overrides.
fn read_recipe(path: Option<&Path>, overrides: &[String]) -> anyhow::Result<Recipe> {
    Ok(Recipe::read(path, overrides)?)
}

/// What a generation does with its text: shows it (unless told not to) until Ctrl-C, or until standard output fails,
/// which `written` then tells.
fn stream_to<'a>(
    printer: &'a Printer,
    show: bool,
    written: &'a mut Written,
) -> impl FnMut(&str) -> ControlFlow<()> + 'a {
    move |piece| {
        if show {
            *written = printer.stream(piece);
        }
        if written.is_err() || interrupt::raised() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

/// The last part of a model's path.
fn short_name(model: &str) -> String {
    let name = Path::new(model).file_name();
    name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Reads a text file.
fn read_text(path: &Path) -> anyhow::Result<String> {
    files::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Reads a text that is read once: from a file, or from a pipe such as a shell's `<(…)`.
fn read_text_once(path: &Path, printer: &Printer) -> anyhow::Result<String> {
    let kind = std::fs::metadata(path).ok().as_ref().and_then(files::kind);
    let opened = || File::open(path).with_context(|| format!("cannot read {}", path.display()));
    let name = path.display().to_string();
    match kind {
        Some("a named pipe") => {
            printer.note(format_args!("reading {name} until its writer closes it"));
            read_piped(opened()?, &name)
        }
        Some("a device") => {
            let device = opened()?;
            if device.is_terminal() { read_piped(device, &name) } else { read_text(path) }
        }
        _ => read_text(path),
    }
}

/// Most bytes of a text that comes through a pipe, which has no end until its writer gives it one.
const PIPED_BYTES: u64 = 256 << 20;

/// Reads a text to the end of a pipe or a terminal.
fn read_piped(pipe: impl Read, name: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    pipe.take(PIPED_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {name}"))?;
    if bytes.len() as u64 > PIPED_BYTES {
        return Err(user(
            format!("{name} gives more than {} MiB of text", PIPED_BYTES >> 20),
            "give a shorter text",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        user(format!("{name}: not UTF-8 at byte {at}"), "give UTF-8 text")
    })
}

/// An error unless all data are files.
fn check_data(data: &[PathBuf]) -> anyhow::Result<()> {
    const KINDS: &str = "give --data files: .txt, .jsonl, .jsonl.zst or .bin";
    for path in data {
        match path.metadata().as_ref().map(files::kind) {
            Err(_) => return Err(user(format!("no file {}", path.display()), KINDS)),
            Ok(Some(kind)) => {
                return Err(user(format!("{} is {kind}, not a file", path.display()), KINDS));
            }
            Ok(None) => {}
        }
    }
    Ok(())
}

/// Checks sampling options and translates them.
fn sampling(args: &SamplingArgs) -> anyhow::Result<GenerateOptions> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(user(
            format!("--temperature {} is out of range", args.temperature),
            "use 0 for the likeliest token, or a positive number such as 0.7",
        ));
    }
    if let Some(top_p) = args.top_p
        && !(top_p > 0.0 && top_p <= 1.0)
    {
        return Err(user(
            format!("--top-p {top_p} is out of range"),
            "use a probability above 0 and at most 1",
        ));
    }
    if args.top_k == Some(0) {
        return Err(user("--top-k 0 leaves no token to choose", "use 1 or more, or leave it out"));
    }
    if args.temperature == 0.0 && (args.top_p.is_some() || args.top_k.is_some()) {
        return Err(user(
            "--top-p and --top-k do nothing at temperature 0",
            "add --temperature, such as 0.7",
        ));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(user("an empty --stop would end at once", "give the text to stop at"));
    }
    Ok(GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p.unwrap_or(1.0),
        top_k: args.top_k.unwrap_or(0),
        seed: args.seed,
        stop: args.stop.clone(),
        cancel: interrupt::flag(),
    })
}

/// How exact rows are stored: as asked for, or as computed on a device, on the CPU as `usual`.
fn row_dtype(asked: Option<CacheDtype>, usual: RowDtype, model: &Model) -> RowDtype {
    match asked {
        Some(CacheDtype::F32) => RowDtype::F32,
        Some(CacheDtype::Bf16) => RowDtype::Bf16,
        Some(CacheDtype::F16) => RowDtype::F16,
        Some(CacheDtype::Int8) => RowDtype::Int8,
        None if model.device().is_cpu() => usual,
        None if model.decoder.dtype() == DType::BF16 => RowDtype::Bf16,
        None => RowDtype::F32,
    }
}
