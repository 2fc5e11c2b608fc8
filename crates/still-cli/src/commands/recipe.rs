//! The recipe of a command.

use std::path::PathBuf;

use clap::Args;
use still_train::{BuiltIn, Recipe};

/// A recipe, and what is changed of it.
#[derive(Clone, Debug, Args)]
pub struct RecipeArgs {
    /// Recipe: a name of `still recipes list`, or a TOML file [default: the usual one for the device]
    #[arg(long, short, value_name = "NAME|FILE")]
    pub recipe: Option<PathBuf>,
    /// Override one recipe value, such as --set transfer.steps=200; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl RecipeArgs {
    /// Reads the recipe, or takes the usual one, and applies what is changed.
    ///
    /// # Errors
    /// A file that cannot be read, a key or value that is none.
    pub fn resolve(&self, usual: BuiltIn) -> anyhow::Result<Recipe> {
        Ok(match &self.recipe {
            Some(recipe) => Recipe::read(Some(recipe), &self.set)?,
            None => Recipe::parse(usual.text, &self.set)?,
        })
    }
}
