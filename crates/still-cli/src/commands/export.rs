//! `still export`: a student with quantized weights, in one file.

use std::path::Path;

use still_model::files::parent;
use still_model::{GgufFormat, export_gguf};

use super::load;
use crate::args::{DeviceArgs, ExportArgs, GgufArg};
use crate::disk::room;
use crate::errors::user;
use crate::outputs::{Existing, Ours, Outputs};
use crate::printer::Printer;

/// Runs the command.
pub fn run(args: &ExportArgs, printer: &Printer) -> anyhow::Result<()> {
    if args.out.extension().is_none_or(|extension| extension != "gguf") {
        return Err(user(
            format!("{} is not the name of a GGUF file", args.out.display()),
            "choose a name that ends in .gguf: it is what tells the file's format",
        ));
    }
    let existing = Existing::overwrite(args.overwrite);
    let mut outputs = Outputs::default();
    outputs.spare([Path::new(&args.model.model)])?;
    outputs.file("--out", &args.out, Ours::Student, existing)?;
    let model = load(&args.model.model, &DeviceArgs::cpu(), printer)?;
    if model.student.is_none() {
        return Err(user(
            format!("{} is not a student", args.model.model),
            "linearize it first (still linearize); base models are quantized by the tools of their own format",
        ));
    }
    let format = match args.gguf {
        GgufArg::Q8_0 => GgufFormat::Q8_0,
        GgufArg::Q4_1 => GgufFormat::Q4_1,
        GgufArg::Q4K => GgufFormat::Q4K,
    };
    // The fewest bits a value that the formats have.
    let sixteenths = match args.gguf {
        GgufArg::Q8_0 => 17,
        GgufArg::Q4_1 | GgufArg::Q4K => 9,
    };
    let bytes = model.decoder.elements()?.saturating_mul(sixteenths) / 16;
    room(&parent(&args.out), "the file", bytes, "free some disk space, or choose another --out")?;
    let export = export_gguf(&args.out, &model, format)?;
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
    printer.step("Saved", format_args!("{} ({megabytes:.1} MB)", args.out.display()));
    if args.json {
        printer.json(&serde_json::json!({
            "out": args.out.display().to_string(),
            "bytes": export.bytes,
            "matrices": export.matrices,
            "other_format": export.other_format,
        }))?;
    }
    Ok(())
}
