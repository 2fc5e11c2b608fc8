//! `still completions`: completion scripts for shells.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still completions bash > ~/.local/share/bash-completion/completions/still
  still completions zsh > ~/.zfunc/_still
  still completions fish > ~/.config/fish/completions/still.fish";

/// `still completions`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

/// Runs the command: the completion script of `still`, the whole command line.
pub fn run(args: &CompletionsArgs, mut still: Command, printer: &Printer) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut still, "still", &mut script);
    Ok(printer.stream(&String::from_utf8(script)?)?)
}
