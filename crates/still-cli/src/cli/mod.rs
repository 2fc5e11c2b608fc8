//! The command line as a whole: the commands, and the options of all of them.
//!
//! A command's arguments are declared next to it, in [`crate::commands`]. Where arguments must be checked, opened or combined,
//! `resolve` turns them into the command's settings, once, before it does anything.
//!
//! | file | content |
//! |---|---|
//! | `groups` | the commands of `still --help`, in groups |
//! | `headings` | the options of a command's help, under headings |
//! | `usage` | help, version and usage errors on the terminal |
//! | `moved` | what to type instead of an older spelling |
//! | `documented` | a test: commands in pages and messages are valid |

#[cfg(test)]
mod documented;
mod groups;
mod headings;
mod moved;
pub mod usage;

use std::ffi::OsString;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::commands::{
    ask::AskArgs, bench::BenchArgs, calibrate::CalibrateArgs, chat::ChatArgs,
    completions::CompletionsArgs, demo::DemoArgs, doctor::DoctorArgs, eval::EvalArgs,
    export::ExportArgs, generate::GenerateArgs, inspect::InspectArgs, linearize::LinearizeArgs,
    man::ManArgs, models::ModelsArgs, recipes::RecipesArgs, report::ReportArgs, serve::ServeArgs,
};
use crate::printer::Color;

const EXAMPLES: &str = "\
Examples:
  still demo
  still linearize --model org/name --data books.jsonl.zst --out my-student
  still chat --model my-student

`still COMMAND --help` explains a command and has more examples.";

/// Linearize pretrained transformers with STILL, and run the result.
#[derive(Debug, Parser)]
#[command(name = "still", version, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
}

/// The command line as it is parsed, helped with and completed.
pub fn command() -> clap::Command {
    groups::grouped(headings::headed(take_negative_numbers(Cli::command())))
}

/// Makes `--batch -1` a value out of range instead of an unknown option `-1`.
fn take_negative_numbers(command: clap::Command) -> clap::Command {
    let take = |arg: clap::Arg| {
        let option = !arg.is_positional() && arg.get_action().takes_values();
        arg.allow_negative_numbers(option)
    };
    command.mut_args(take).mut_subcommands(take_negative_numbers)
}

impl Cli {
    /// Reads words, the program's name first.
    ///
    /// # Errors
    /// A usage error; help and version, which are results ([`usage::report`]).
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let matches = command().try_get_matches_from(words)?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command()))
    }
}

/// Options of every command.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Print only warnings and errors on stderr
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print more on stderr; twice for everything
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Colors on stderr; auto: on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub color: Color,
    /// Threads that compute, 1 to 1024 [default: RAYON_NUM_THREADS, or as many as the system grants]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
}

/// The commands. [`groups`] has what each is for.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compare a student that ships with its teacher, or train one here
    Demo(DemoArgs),
    /// Turn a pretrained model into a STILL student
    Linearize(LinearizeArgs),
    /// Find how many tokens each head should keep
    ///
    /// Budgets are those that lose least at a given share of the dense cache's bytes.
    Calibrate(CalibrateArgs),
    /// Write a student as .gguf, as a delta or for transformers
    Export(ExportArgs),
    /// Ask a question about a document
    ///
    /// The document is read once. With --session the next question is answered at once.
    Ask(AskArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk to a model
    ///
    /// Its attention state is kept between turns: only what is new is read.
    Chat(ChatArgs),
    /// Answer OpenAI's clients, and a page in the browser
    ///
    /// States of conversations are kept, so that what was read once is not read again.
    Serve(Box<ServeArgs>),
    /// Ask a model the questions of benchmarks, and compare models
    ///
    /// Questions are asked and scored as lm-evaluation-harness does.
    Eval(Box<EvalArgs>),
    /// Time a model, its training steps, or the attention operator
    Bench(BenchArgs),
    /// Show which tokens each layer and head keeps of a text
    Inspect(InspectArgs),
    /// Draw a run of training, or evaluations, as one HTML page
    Report(ReportArgs),
    /// List the recipes that are built in, and print one
    Recipes(RecipesArgs),
    /// Show what was fetched, and its size on the disk
    Models(ModelsArgs),
    /// Show versions, CPU features, devices and caches
    Doctor(DoctorArgs),
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
    /// Write the manual pages of all commands
    Man(ManArgs),
}

/// Every command without commands of its own, by the words that lead there.
#[cfg(test)]
fn leaves(command: &clap::Command, path: &str, found: &mut Vec<(String, clap::Command)>) {
    if command.get_subcommands().next().is_none() {
        found.push((path.to_owned(), command.clone()));
    }
    for subcommand in command.get_subcommands() {
        leaves(subcommand, &format!("{path} {}", subcommand.get_name()), found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_is_sound() {
        command().debug_assert();
    }

    fn examples(command: &clap::Command) -> Vec<String> {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let (_, examples) = help.split_once("Examples:\n").unwrap_or_default();
        let lines = examples.lines().map_while(|line| line.strip_prefix("  "));
        lines.map(str::to_owned).collect()
    }

    #[test]
    fn every_command_has_examples_that_it_takes() {
        let root = command();
        let mut all = vec![("still".to_owned(), root.clone())];
        leaves(&root, "still", &mut all);
        assert!(all.len() > 15, "{}", all.len());
        for (path, command) in all {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            // Longer lines are wrapped in a narrow terminal, and could not be copied.
            assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
            let examples = examples(&command);
            assert!(!examples.is_empty(), "`{path} --help` has no examples");
            for example in examples {
                assert!(example.starts_with(&path), "{example:?} is no example of `{path}`");
                // What comes after `>` is the shell's.
                let words = shlex::split(&example).unwrap().into_iter();
                let words = words.take_while(|word| word != ">").map(OsString::from);
                let parsed = Cli::read(words).err().map(|error| error.to_string());
                assert_eq!(parsed, None, "{example}");
            }
        }
    }
}
