//! A folder that transformers opens, ready to be shared.

use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};
use still_model::export_transformers;
use still_model::files::parent;

use super::card::About;
use super::{Settings, claim_folder, student};
use crate::disk::room;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table::file_bytes;

/// Writes it and says what was written.
pub fn write(
    settings: &Settings,
    dir: &Path,
    dtype: DType,
    about: &About,
    printer: &Printer,
) -> anyhow::Result<Value> {
    let about = about.read()?;
    let target = claim_folder(settings, "--transformers", dir)?;
    let model = student(settings, printer)?;
    let bytes = model.decoder.elements()? * dtype.size_in_bytes() as u64;
    room(
        &parent(target.dir()),
        "the folder",
        bytes,
        "free some disk space, or choose another place",
    )?;
    let card = about.card(&model, dtype, target.dir())?;
    let bar = Bar::new(printer, "Saving", "the folder", 0, "");
    export_transformers(&target, &model, dtype, &card)?;
    drop(bar);
    for missing in about.missing(&model) {
        printer.note(format_args!("the model card does not say {missing}"));
    }
    let written = target.dir().join("model.safetensors").metadata()?.len();
    printer.step("Saved", format_args!("{} ({} of weights)", dir.display(), file_bytes(written)));
    Ok(
        json!({ "transformers": dir.display().to_string(), "bytes": written, "dtype": dtype.as_str() }),
    )
}
