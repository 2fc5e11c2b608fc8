//! What `still linearize` and `still calibrate` start from: a teacher, data and a recipe.

use std::path::PathBuf;

use clap::Args;
use still_train::Recipe;

use super::input::check_data;
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
    /// Data: .txt, .jsonl or .jsonl.zst (a text or chat messages a line), .bin (token ids); several may be given, mixed by
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
    /// Where the recipe was read.
    pub recipe_file: Option<PathBuf>,
}

impl TrainingArgs {
    /// Reads the recipe.
    ///
    /// # Errors
    /// Data that are no files, a recipe that cannot be used, a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Inputs> {
        check_data(&self.data)?;
        Ok(Inputs {
            recipe: self.recipe.resolve()?,
            recipe_file: self.recipe.recipe,
            place: self.device.resolve()?,
            model: self.model.model,
            data: self.data,
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
