//! A folder that transformers opens, ready to be shared.

use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};
use still_model::files::parent;
use still_model::{StudentTarget, export_transformers};

use super::card::About;
use super::{Settings, student};
use crate::disk::room;
use crate::errors::user;
use crate::outputs::{Existing, existing_ancestor, writable};
use crate::printer::Printer;

/// Writes it and says what was written.
pub fn write(
    settings: &Settings,
    dir: &Path,
    dtype: DType,
    about: &About,
    printer: &Printer,
) -> anyhow::Result<Value> {
    const CHOOSE: &str = "choose another folder";
    if let (Ok(model), Ok(real)) = (Path::new(&settings.model).canonicalize(), dir.canonicalize())
        && model == real
    {
        return Err(user(
            format!("--transformers {} is the student itself", dir.display()),
            CHOOSE,
        ));
    }
    if settings.existing == Existing::Refuse && dir.symlink_metadata().is_ok() {
        return Err(user(
            format!("{} exists already", dir.display()),
            format!("{CHOOSE}, or add --overwrite"),
        ));
    }
    writable(&existing_ancestor(&parent(dir)))?;
    let about = about.read()?;
    let target = StudentTarget::claim(dir)?;
    let model = student(settings, printer)?;
    let bytes = model.decoder.elements()? * dtype.size_in_bytes() as u64;
    room(
        &parent(target.dir()),
        "the folder",
        bytes,
        "free some disk space, or choose another place",
    )?;
    let card = about.card(&model, dtype, target.dir())?;
    export_transformers(&target, &model, dtype, &card)?;
    for missing in about.missing(&model) {
        printer.note(format_args!("the model card does not say {missing}"));
    }
    let written = target.dir().join("model.safetensors").metadata()?.len();
    let megabytes = written as f64 / 1e6;
    printer.step("Saved", format_args!("{} ({megabytes:.1} MB of weights)", dir.display()));
    Ok(
        json!({ "transformers": dir.display().to_string(), "bytes": written, "dtype": dtype.as_str() }),
    )
}
