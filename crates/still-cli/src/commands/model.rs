//! The model and the device of a command.

use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;
use still_model::{Model, WeightFormat};

use super::fetching;
use crate::args::one_of;
use crate::errors::user;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

/// The model to use.
#[derive(Clone, Debug, Args)]
pub struct ModelArg {
    /// Hugging Face directory, .gguf file, hub id (org/name), a student made by `still linearize`, or a built-in one: demo
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
}

/// Dtypes of base weights and activations; bf16 on CUDA alone.
const COMPUTE_DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// Where a model computes.
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Number format of base weights and activations [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "DTYPE", value_parser = one_of(&COMPUTE_DTYPES, |dtype| dtype.as_str()))]
    compute_dtype: Option<DType>,
}

/// Where a model computes, and how its matrices are kept there.
#[derive(Clone, Debug, Args)]
pub struct PlaceArgs {
    /// The device.
    #[command(flatten)]
    device: DeviceArgs,
    /// How matrices are kept: as the model's file has them, where the device can multiply by that; in --compute-dtype;
    /// or quantized to 8 bits (fp8 on CUDA)
    #[arg(long, value_name = "FORMAT", default_value = "file", value_parser = one_of(&WeightFormat::ALL, WeightFormat::name))]
    weights: WeightFormat,
}

impl PlaceArgs {
    /// Opens the device.
    ///
    /// # Errors
    /// One that is not there.
    pub fn resolve(self) -> anyhow::Result<Place> {
        Ok(Place { weights: self.weights, ..self.device.resolve()? })
    }
}

/// A device, opened, and the dtype of base weights and activations there.
#[derive(Clone, Debug)]
pub struct Place {
    /// As it was asked for.
    pub name: String,
    /// The device.
    pub device: Device,
    /// Of base weights and activations.
    pub dtype: DType,
    /// How matrices are kept.
    pub weights: WeightFormat,
}

impl DeviceArgs {
    /// Opens the device.
    ///
    /// # Errors
    /// One that is not there.
    pub fn resolve(self) -> anyhow::Result<Place> {
        let device = still_model::device(&self.device)?;
        let dtype = match self.compute_dtype {
            Some(dtype) => dtype,
            None => still_model::usual_dtype(&device)?,
        };
        Ok(Place { name: self.device, device, dtype, weights: WeightFormat::File })
    }
}

impl Place {
    /// Of commands that only the CPU has.
    pub fn cpu() -> Self {
        let (device, dtype, weights) = (Device::Cpu, DType::F32, WeightFormat::File);
        Self { name: "cpu".into(), device, dtype, weights }
    }
}

/// Loads a model onto its device and says which one.
pub fn load(model: &str, place: &Place, printer: &Printer) -> anyhow::Result<Model> {
    if still_model::is_built_in(model) {
        fetch_demo(printer)?;
    }
    let bar = Bar::uncounted(printer, "Loading", model);
    let model = Model::load_with_progress(
        model,
        &place.device,
        place.dtype,
        place.weights,
        &fetching::bars(printer),
    )?;
    drop(bar);
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
    report_weights(&model, printer);
    Ok(model)
}

/// Fetches the demo's model, if it is not here yet.
///
/// # Errors
/// As [`still_model::fetch::demo_model`].
pub fn fetch_demo(printer: &Printer) -> anyhow::Result<PathBuf> {
    let _bar = Bar::new(printer, "Fetching", "the demo's model", 0, "");
    Ok(still_model::fetch::demo_model(&mut |line| printer.step("Fetching", line))?)
}

/// Says how matrices are kept and what they take.
pub fn report_weights(model: &Model, printer: &Printer) {
    let (bytes, formats) = model.decoder.formats();
    let formats: Vec<String> =
        formats.iter().map(|(name, count)| format!("{count} in {name}")).collect();
    let (formats, bytes) = (formats.join(", "), table::bytes(bytes));
    printer.step("Keeping", format_args!("{bytes} of weights, matrices: {formats}"));
}

/// Loads a model that is no student yet; `verb` says what is to be done with it.
pub fn load_base(
    model: &str,
    place: &Place,
    verb: &str,
    printer: &Printer,
) -> anyhow::Result<Model> {
    let loaded = load(model, place, printer)?;
    if loaded.student.is_some() {
        let base = match &loaded.base.source {
            base if base != model => format!(", {base}"),
            _ => String::new(),
        };
        return Err(user(
            format!("{model} is a student already"),
            format!("{verb} the base model that it came from{base}"),
        ));
    }
    Ok(loaded)
}
