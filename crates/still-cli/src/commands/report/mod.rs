//! `still report`: a run as one HTML page, its figures as tables.

mod charts;
mod page;
mod settings;
mod summary;

use anyhow::Context;
use still_model::files::write_file;

use self::summary::Summary;
use crate::args::ReportArgs;
use crate::errors::user;
use crate::printer::Printer;
use crate::run_log::RunLog;

/// Runs the command.
pub fn run(args: &ReportArgs, printer: &Printer) -> anyhow::Result<()> {
    let out = args.out.clone().unwrap_or_else(|| args.run_dir.join("report.html"));
    let log = RunLog::read(&args.run_dir)?;
    if out.is_dir() {
        return Err(user(format!("{} is a directory", out.display()), "name a file for --out"));
    }
    write_file(&out, page::render(&log)?.as_bytes())
        .with_context(|| format!("cannot write {}", out.display()))?;
    printer.step("Wrote", out.display());
    let summary = Summary::new(&log, &out);
    if args.json {
        return printer.json(&summary);
    }
    Ok(printer.result(summary.render())?)
}
