//! What `still generate`, `still chat` and `still ask` go by: a model, its cache, and how the next token is chosen.

use clap::Args;
use still_attention::RowDtype;
use still_model::{GenerateOptions, Model};

use super::cache::CacheArgs;
use super::model::{DeviceArgs, ModelArg, Place, load};
use crate::args::{TOKENS, number, seed, share, whole};
use crate::errors::user;
use crate::interrupt;
use crate::printer::Printer;

/// A model, its cache, and how the next token is chosen.
#[derive(Clone, Debug, Args)]
pub struct GenerationArgs {
    /// The model.
    #[command(flatten)]
    model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    device: DeviceArgs,
    /// What it remembers in.
    #[command(flatten)]
    cache: CacheArgs,
    /// Sampling.
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// How the next token is chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 256, value_parser = whole(0, TOKENS))]
    max_new_tokens: usize,
    /// 0 takes the likeliest token every time
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = number(0.0, 1e6))]
    temperature: f64,
    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f64>,
    /// Sample among this many of the likeliest tokens
    #[arg(long, value_name = "K", value_parser = whole(1, TOKENS))]
    top_k: Option<usize>,
    /// Seed of the sampling
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed)]
    seed: u64,
    /// End when this text appears (it is not printed); may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

/// What a generation goes by.
#[derive(Clone, Debug)]
pub struct GenerationSettings {
    model: String,
    place: Place,
    /// How the cache stores exact rows.
    pub rows: RowDtype,
    /// How tokens are chosen and when that ends.
    pub options: GenerateOptions,
}

impl GenerationArgs {
    /// # Errors
    /// Options that contradict each other; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<GenerationSettings> {
        let options = self.sampling.resolve()?;
        let place = self.device.resolve()?;
        let rows = self.cache.resolve(&place, RowDtype::Bf16)?;
        Ok(GenerationSettings { model: self.model.model, place, rows, options })
    }
}

impl GenerationSettings {
    /// Whether the model computes on the CPU.
    pub fn on_cpu(&self) -> bool {
        self.place.device.is_cpu()
    }

    /// Loads the model.
    ///
    /// # Errors
    /// A model that cannot be loaded.
    pub fn load(&self, printer: &Printer) -> anyhow::Result<Model> {
        load(&self.model, &self.place, printer)
    }
}

impl SamplingArgs {
    /// Checks the options.
    ///
    /// # Errors
    /// Options that do nothing, or end a generation before it begins.
    fn resolve(self) -> anyhow::Result<GenerateOptions> {
        if self.temperature == 0.0 && (self.top_p.is_some() || self.top_k.is_some()) {
            return Err(user(
                "--top-p and --top-k do nothing at temperature 0",
                "add --temperature, such as 0.7",
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(user("an empty --stop would end at once", "give the text to stop at"));
        }
        Ok(GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            seed: self.seed,
            stop: self.stop,
            cancel: interrupt::flag(),
        })
    }
}
