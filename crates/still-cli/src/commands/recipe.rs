//! The recipe that a command goes by.

use std::path::PathBuf;

use clap::Args;
use still_train::Recipe;

/// A recipe, and what is changed of it.
#[derive(Clone, Debug, Args)]
pub struct RecipeArgs {
    /// Training recipe (TOML); built-in defaults without it
    #[arg(long, short, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Override one recipe value, such as --set transfer.steps=200; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl RecipeArgs {
    /// Reads the recipe, or takes the defaults, and applies what is changed.
    ///
    /// # Errors
    /// A file that cannot be read, a key or value that is none.
    pub fn resolve(&self) -> anyhow::Result<Recipe> {
        Ok(Recipe::read(self.recipe.as_deref(), &self.set)?)
    }
}
