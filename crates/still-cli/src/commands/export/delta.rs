//! A folder with a student's learned tensors and a reference to its base.

use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};
use still_model::files::parent;
use still_model::{ExportKind, save_student_to};

use super::{Settings, claim_folder, student};
use crate::disk::room;
use crate::errors::user;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table::file_bytes;

/// Writes it and says what was written.
pub fn write(
    settings: &Settings,
    dir: &Path,
    dtype: DType,
    printer: &Printer,
) -> anyhow::Result<Value> {
    let target = claim_folder(settings, "--delta", dir)?;
    let model = student(settings, printer)?;
    // The base of a full student is in its own file, with the updates merged.
    if model.base.source == settings.model {
        return Err(user(
            format!(
                "{} holds its base, with all that it has learned of it merged: there is no difference to write",
                settings.model
            ),
            "linearize again with --delta, or export another form",
        ));
    }
    let learned = model.student.as_ref().map_or(0, |student| student.parameters());
    let bytes = (learned * dtype.size_in_bytes()) as u64;
    room(
        &parent(target.dir()),
        "the delta",
        bytes,
        "free some disk space, or choose another place",
    )?;
    let kind = if dtype == DType::F32 { ExportKind::Delta } else { ExportKind::DeltaIn(dtype) };
    let bar = Bar::new(printer, "Saving", "the delta", 0, "");
    save_student_to(&target, &model, kind)?;
    drop(bar);
    let written = target.dir().join("student.safetensors").metadata()?.len();
    printer.step(
        "Saved",
        format_args!(
            "{} ({} of learned values, in {})",
            dir.display(),
            file_bytes(written),
            dtype.as_str()
        ),
    );
    Ok(json!({
        "delta": dir.display().to_string(),
        "base": model.base.source,
        "bytes": written,
        "dtype": dtype.as_str(),
    }))
}
