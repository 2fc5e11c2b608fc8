//! `still report`: a run of training, or results of `still eval`, as one HTML page, the figures as tables.

mod eval;
mod run;

use std::path::Path;

use anyhow::Context;
use clap::{Args, Subcommand};
use still_model::files::write_file;

use self::eval::EvalReportArgs;
pub use self::eval::tables_of;
use self::run::RunReportArgs;
use crate::printer::Printer;

const EXAMPLES: &str = "\
Examples:
  still report run my-student.run
  still report eval results.json";

/// `still report`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ReportArgs {
    /// What is drawn.
    #[command(subcommand)]
    what: Report,
}

/// What is drawn.
#[derive(Clone, Debug, Subcommand)]
enum Report {
    /// Draw a run of `still linearize`: verdict, curves, evaluations, layers, budgets, recipe
    Run(RunReportArgs),
    /// Draw results of `still eval --out`: verdict, quality, cache bytes, lengths, variants
    Eval(EvalReportArgs),
}

/// Runs the command.
pub fn run(args: ReportArgs, printer: &Printer) -> anyhow::Result<()> {
    match args.what {
        Report::Run(args) => run::run(&args.resolve(), printer),
        Report::Eval(args) => eval::run(&args.resolve(), printer),
    }
}

/// Writes a file that was checked before.
fn write(path: &Path, text: &str, printer: &Printer) -> anyhow::Result<()> {
    write_file(path, text.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))?;
    printer.step("Wrote", path.display());
    Ok(())
}
