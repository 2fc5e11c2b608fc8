//! `still export`: a student with quantized weights, in one file.

use std::path::{Path, PathBuf};

use clap::Args;
use still_model::files::parent;
use still_model::{GgufFormat, export_gguf};

use super::model::{ModelArg, Place, load};
use crate::args::one_of;
use crate::disk::room;
use crate::errors::user;
use crate::outputs::{Existing, Ours, Outputs};
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still export --model my-student --gguf q4_1 --out my-student.gguf
  still export --model my-student --gguf q8_0 --out my-student.gguf --overwrite";

/// `still export`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ExportArgs {
    /// The student.
    #[command(flatten)]
    model: ModelArg,
    /// Format of the weights, the vocabulary's aside, which has 8 bits; low-rank updates are merged first. Where rows are no
    /// whole blocks of q4_k they take q4_1
    #[arg(long, value_name = "FORMAT", value_parser = one_of(&GgufFormat::ALL, GgufFormat::name))]
    gguf: GgufFormat,
    /// File to write; its name must end in .gguf
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Replace OUT if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// What is written, and where.
#[derive(Debug)]
pub struct Settings {
    model: String,
    format: GgufFormat,
    out: PathBuf,
    existing: Existing,
    json: bool,
}

impl ExportArgs {
    /// # Errors
    /// A name that is none of a GGUF file.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        if self.out.extension().is_none_or(|extension| extension != "gguf") {
            return Err(user(
                format!("{} is not the name of a GGUF file", self.out.display()),
                "choose a name that ends in .gguf: it is what tells the file's format",
            ));
        }
        Ok(Settings {
            model: self.model.model,
            format: self.gguf,
            out: self.out,
            existing: Existing::overwrite(self.overwrite),
            json: self.json,
        })
    }
}

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let out = &settings.out;
    let mut outputs = Outputs::default();
    outputs.spare([Path::new(&settings.model)])?;
    outputs.file("--out", out, Ours::Student, settings.existing)?;
    let model = load(&settings.model, &Place::cpu(), printer)?;
    if model.student.is_none() {
        return Err(user(
            format!("{} is not a student", settings.model),
            "linearize it first (still linearize); base models are quantized by the tools of their own format",
        ));
    }
    let bytes = settings.format.bytes(model.decoder.elements()?);
    room(&parent(out), "the file", bytes, "free some disk space, or choose another --out")?;
    let export = export_gguf(out, &model, settings.format)?;
    let matrices: Vec<String> =
        export.matrices.iter().map(|(format, count)| format!("{count} in {format}")).collect();
    printer.step("Quantized", format_args!("matrices: {}", matrices.join(", ")));
    if export.other_format > 0 {
        printer.note(format_args!(
            "the rows of {} matrices are no whole blocks of the format asked for",
            export.other_format
        ));
    }
    let megabytes = export.bytes as f64 / 1e6;
    printer.step("Saved", format_args!("{} ({megabytes:.1} MB)", out.display()));
    if settings.json {
        printer.json(&serde_json::json!({
            "out": out.display().to_string(),
            "bytes": export.bytes,
            "matrices": export.matrices,
            "other_format": export.other_format,
        }))?;
    }
    Ok(())
}
