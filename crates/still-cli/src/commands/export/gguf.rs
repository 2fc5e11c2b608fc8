//! One file with quantized weights.

use std::path::Path;

use serde_json::{Value, json};
use still_model::files::parent;
use still_model::{GgufFormat, export_gguf};

use super::{Settings, student};
use crate::disk::room;
use crate::outputs::{OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table::file_bytes;

/// Writes it and says what was written.
pub fn write(
    settings: &Settings,
    format: GgufFormat,
    out: &Path,
    printer: &Printer,
) -> anyhow::Result<Value> {
    let mut outputs = Outputs::default();
    outputs.spare([Path::new(&settings.model)])?;
    outputs.file("--out", out, OutputKind::Student, settings.existing)?;
    let model = student(settings, printer)?;
    let bytes = format.bytes(model.decoder.elements()?);
    room(&parent(out), "the file", bytes, "free some disk space, or choose another --out")?;
    let bar = Bar::new(printer, "Quantizing", "the weights", 0, "");
    let export = export_gguf(out, &model, format)?;
    drop(bar);
    let matrices: Vec<String> =
        export.matrices.iter().map(|(format, count)| format!("{count} in {format}")).collect();
    printer.step("Quantized", format_args!("matrices: {}", matrices.join(", ")));
    if export.other_format > 0 {
        printer.note(format_args!(
            "the rows of {} matrices are no whole blocks of the format asked for",
            export.other_format
        ));
    }
    printer.step("Saved", format_args!("{} ({})", out.display(), file_bytes(export.bytes)));
    Ok(json!({
        "out": out.display().to_string(),
        "bytes": export.bytes,
        "matrices": export.matrices,
        "other_format": export.other_format,
    }))
}
