//! The model that a command works on, and where it computes.

use candle_core::{DType, Device};
use clap::Args;
use still_model::Model;

use crate::args::one_of;
use crate::errors::user;
use crate::printer::Printer;

/// The model to use.
#[derive(Clone, Debug, Args)]
pub struct ModelArg {
    /// Hugging Face directory, .gguf file, hub id (org/name), or a student made by `still linearize`
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

/// A device, opened, and the dtype of base weights and activations there.
#[derive(Clone, Debug)]
pub struct Place {
    /// As it was asked for.
    pub name: String,
    /// The device.
    pub device: Device,
    /// Of base weights and activations.
    pub dtype: DType,
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
        Ok(Place { name: self.device, device, dtype })
    }
}

impl Place {
    /// Of commands that only the CPU has.
    pub fn cpu() -> Self {
        Self { name: "cpu".into(), device: Device::Cpu, dtype: DType::F32 }
    }
}

/// Loads a model onto its device and says which one.
pub fn load(model: &str, place: &Place, printer: &Printer) -> anyhow::Result<Model> {
    printer.step("Loading", model);
    let model = Model::load_on(model, &place.device, place.dtype)?;
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
pub fn load_base(
    model: &str,
    place: &Place,
    verb: &str,
    printer: &Printer,
) -> anyhow::Result<Model> {
    let loaded = load(model, place, printer)?;
    if loaded.student.is_some() {
        return Err(user(
            format!("{model} is a student already"),
            format!("{verb} the base model that it came from"),
        ));
    }
    Ok(loaded)
}
