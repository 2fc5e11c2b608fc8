//! `still recipes`: the built-in recipes.

use clap::{Args, Subcommand};
use serde_json::json;
use still_train::BuiltIn;

use crate::printer::Printer;
use crate::table;
use crate::wrap::wrapped;

const EXAMPLES: &str = "\
Examples:
  still recipes list
  still recipes show quick > my.toml";

/// `still recipes`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RecipesArgs {
    /// What to do.
    #[command(subcommand)]
    what: Recipes,
}

#[derive(Clone, Debug, Subcommand)]
enum Recipes {
    /// List names, and what each recipe trains
    #[command(after_help = "Examples:\n  still recipes list\n  still recipes list --json")]
    List {
        /// Print one JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Print a recipe, to be changed
    #[command(
        after_help = "Examples:\n  still recipes show quick\n  still recipes show paper > my.toml"
    )]
    Show {
        /// Its name
        #[arg(value_name = "NAME", value_parser = BuiltIn::ALL.map(|recipe| recipe.name))]
        name: String,
    },
}

/// Runs the command.
pub fn run(args: &RecipesArgs, printer: &Printer) -> anyhow::Result<()> {
    match &args.what {
        Recipes::List { json: true } => {
            let all =
                BuiltIn::ALL.map(|recipe| json!({ "name": recipe.name, "about": recipe.about() }));
            printer.json(&json!({ "recipes": all }))
        }
        Recipes::List { json: false } => Ok(printer.result(list())?),
        Recipes::Show { name } => {
            let recipe = BuiltIn::named(name.as_ref());
            Ok(printer.stream(recipe.map_or("", |recipe| recipe.text))?)
        }
    }
}

/// A name, and next to it what the recipe trains, in the columns of a terminal.
fn list() -> String {
    let width = BuiltIn::ALL.iter().map(|recipe| recipe.name.len()).max().unwrap_or(0) + 2;
    let mut lines = Vec::new();
    for recipe in BuiltIn::ALL {
        let about = wrapped(&recipe.about(), table::WIDTH - width);
        for (n, line) in about.lines().enumerate() {
            let name = if n == 0 { recipe.name } else { "" };
            lines.push(format!("{name:width$}{line}"));
        }
    }
    lines.join("\n")
}
