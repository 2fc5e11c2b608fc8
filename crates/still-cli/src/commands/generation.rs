//! Common options of `still generate`, `still chat` and `still ask`: the model, its cache, and sampling.

use clap::Args;
use still_attention::RowDtype;
use still_model::{GenerateOptions, Model};

use super::cache::{CacheArgs, CacheRows};
use super::model::{ModelArg, Place, PlaceArgs, load};
use super::sampling::{Sampling, SamplingArgs, Usual};
use crate::printer::Printer;

/// A model, its cache, and how the next token is chosen.
#[derive(Clone, Debug, Args)]
pub struct GenerationArgs {
    /// The model.
    #[command(flatten)]
    model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    device: PlaceArgs,
    /// What it remembers in.
    #[command(flatten)]
    cache: CacheArgs,
    /// Sampling.
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What a generation goes by.
#[derive(Clone, Debug)]
pub struct GenerationSettings {
    model: String,
    place: Place,
    /// How the cache stores exact rows.
    pub rows: CacheRows,
    /// How tokens are chosen and when that ends.
    pub sampling: Sampling,
}

impl GenerationArgs {
    /// `usual`: the sampling that options leave open.
    ///
    /// # Errors
    /// Options that contradict each other; a device that is not there.
    pub fn resolve(self, usual: Usual) -> anyhow::Result<GenerationSettings> {
        let sampling = self.sampling.resolve(usual)?;
        let place = self.device.resolve()?;
        let rows = self.cache.resolve(&place, RowDtype::Bf16)?;
        Ok(GenerationSettings { model: self.model.model, place, rows, sampling })
    }
}

impl GenerationSettings {
    /// Loads the model.
    ///
    /// # Errors
    /// A model that cannot be loaded.
    pub fn load(&self, printer: &Printer) -> anyhow::Result<Model> {
        load(&self.model, &self.place, printer)
    }

    /// How this model's tokens are chosen.
    ///
    /// # Errors
    /// A suggestion of its makers that is out of range.
    pub fn options(&self, model: &Model) -> anyhow::Result<GenerateOptions> {
        self.sampling.options(model)
    }
}
