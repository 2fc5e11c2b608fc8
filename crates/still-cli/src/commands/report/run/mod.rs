//! `still report run`: a training run, finished or still running.

mod charts;
mod page;
mod settings;
mod summary;

use std::path::PathBuf;

use clap::Args;

use self::summary::Summary;
use super::write;
use crate::outputs::{Existing, OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::Bar;
use crate::run_log::RunLog;

const EXAMPLES: &str = "\
Examples:
  still report run my-student.run
  still report run my-student.run --out page.html --json";

/// `still report run`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunReportArgs {
    /// Run directory of `still linearize`, of a finished run or one that goes on
    #[arg(value_name = "RUN_DIR")]
    dir: PathBuf,
    /// The page to write [default: report.html in RUN_DIR]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print one JSON object on stdout instead of the tables
    #[arg(long)]
    json: bool,
}

/// What is drawn, and where.
#[derive(Debug)]
pub struct Settings {
    dir: PathBuf,
    out: PathBuf,
    json: bool,
}

impl RunReportArgs {
    /// The page next to the run's own files, unless another is asked for.
    pub fn resolve(self) -> Settings {
        let out = self.out.unwrap_or_else(|| self.dir.join("report.html"));
        Settings { dir: self.dir, out, json: self.json }
    }
}

/// Draws the page, and prints the figures.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let Settings { dir, out, json } = settings;
    let bar = Bar::new(printer, "Drawing", "the page", 0, "");
    let log = RunLog::read(dir)?;
    Outputs::default().file("--out", out, OutputKind::Page, Existing::Replace)?;
    let page = page::render(&log)?;
    drop(bar);
    write(out, &page, printer)?;
    let summary = Summary::new(&log, out);
    if *json { printer.json(&summary) } else { Ok(printer.result(summary.render())?) }
}
