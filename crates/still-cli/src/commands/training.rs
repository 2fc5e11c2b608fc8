//! Common inputs of `still linearize` and `still calibrate`: a teacher, data and a recipe.

use std::path::PathBuf;

use clap::Args;
use still_train::{BuiltIn, Recipe};

use super::data::data_files;
use super::fetching;
use super::model::{ModelArg, Place, PlaceArgs, load_base};
use super::recipe::RecipeArgs;
use crate::printer::Printer;

/// A teacher, data and a recipe.
#[derive(Clone, Debug, Args)]
pub struct TrainingArgs {
    /// The teacher.
    #[command(flatten)]
    model: ModelArg,
    /// Where it computes.
    #[command(flatten)]
    device: PlaceArgs,
    /// Data: .txt or .md, .jsonl (a text or chat messages a line), both also as .gz or .zst, .parquet, .bin (token ids); a
    /// folder of them; a dataset of a hub (org/name); or "demo", the books of `still demo`. Several may be given, mixed by
    /// data.weights
    #[arg(long, short, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// The attention, and how it is trained.
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// A teacher, data and a recipe, each looked at.
#[derive(Debug)]
pub struct Inputs {
    pub model: String,
    pub place: Place,
    pub data: Vec<PathBuf>,
    pub recipe: Recipe,
    /// Where the recipe was read, or its name.
    pub recipe_file: Option<PathBuf>,
    /// The built-in recipe that was taken because none was named.
    pub usual: Option<BuiltIn>,
}

impl TrainingArgs {
    /// Reads the recipe.
    ///
    /// # Errors
    /// Data that are no files, a recipe that cannot be used, a device that is not there.
    pub fn resolve(self, printer: &Printer) -> anyhow::Result<Inputs> {
        let place = self.device.resolve()?;
        let usual = BuiltIn::usual(&place.device);
        Ok(Inputs {
            recipe: self.recipe.resolve(usual)?,
            usual: self.recipe.recipe.is_none().then_some(usual),
            recipe_file: self.recipe.recipe,
            data: data_files(&self.data, &fetching::bars(printer))?,
            place,
            model: self.model.model,
        })
    }
}

impl Inputs {
    /// Loads the teacher; `verb` says what is to be done with it.
    ///
    /// # Errors
    /// A model that cannot be loaded, or is a student.
    pub fn load(&self, verb: &str, printer: &Printer) -> anyhow::Result<still_model::Model> {
        load_base(&self.model, &self.place, verb, printer)
    }
}
