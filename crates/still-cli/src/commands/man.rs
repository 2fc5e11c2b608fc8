//! `still man`: a manual page for every command.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};
use still_model::files::write_file;

use crate::outputs::{Existing, OutputKind, Outputs, existing_ancestor, writable};
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still man --out ~/.local/share/man/man1
  still man --out man";

/// `still man`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ManArgs {
    /// Directory for the pages: still.1, still-chat.1 and so on; made if it is not there
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command: the pages of `still`, the whole command line.
pub fn run(args: &ManArgs, still: Command, printer: &Printer) -> anyhow::Result<()> {
    let dir = &args.out;
    writable(&existing_ancestor(dir))?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut root = still.disable_help_subcommand(true);
    // Gives commands of commands their full names and the options of every command.
    root.build();
    let mut pages = Vec::new();
    collect(&root, &mut pages)?;
    let mut outputs = Outputs::default();
    for (name, _) in &pages {
        outputs.file("--out", &dir.join(name), OutputKind::ManPage, Existing::Replace)?;
    }
    for (name, page) in &pages {
        let path = dir.join(name);
        write_file(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    printer.step("Wrote", format_args!("{} pages in {}", pages.len(), dir.display()));
    Ok(())
}

/// The page of a command, and those of its commands.
fn collect(command: &Command, pages: &mut Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
    pages.push(page(command)?);
    command.get_subcommands().try_for_each(|subcommand| collect(subcommand, pages))
}

/// A page's file name and text: what clap_mangen renders, but that examples are set as they are, under their own heading.
fn page(command: &Command) -> anyhow::Result<(String, Vec<u8>)> {
    let version = concat!("still ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(version).manual("still");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let mut examples = Roff::default();
    examples.control("SH", ["EXAMPLES"]).control("EX", []);
    for line in help.lines().filter_map(|line| line.strip_prefix("  ")) {
        examples.text([roman(line)]);
    }
    examples.control("EE", []).to_writer(&mut page)?;
    Ok((man.get_filename(), page))
}
