//! `still report`: a run, or results of `still eval`, as one HTML page, the figures as tables.

mod charts;
mod evals;
mod page;
mod settings;
mod summary;

use std::path::Path;

use anyhow::Context;
use still_model::files::write_file;

pub use self::evals::MARKDOWN_NOTE;
use self::summary::Summary;
use crate::args::ReportArgs;
use crate::errors::user;
use crate::outputs::{Existing, Ours, Outputs};
use crate::printer::Printer;
use crate::run_log::RunLog;

/// Runs the command: a directory is a run, files are results.
pub fn run(args: &ReportArgs, printer: &Printer) -> anyhow::Result<()> {
    if let [path] = args.paths.as_slice()
        && !path.is_file()
    {
        return of_run(path, args, printer);
    }
    if let Some(path) = args.paths.iter().find(|path| path.is_dir()) {
        return Err(user(
            format!("{} is a directory among {} arguments", path.display(), args.paths.len()),
            "a run is drawn alone; several files of `still eval --json` are drawn together",
        ));
    }
    evals::run(args, printer)
}

fn of_run(dir: &Path, args: &ReportArgs, printer: &Printer) -> anyhow::Result<()> {
    if args.markdown.is_some() {
        return Err(user(
            format!("--markdown is of files of `still eval --json`, and {} is none", dir.display()),
            "leave it out, or name such files",
        ));
    }
    let out = args.out.clone().unwrap_or_else(|| dir.join("report.html"));
    let log = RunLog::read(dir)?;
    Outputs::default().file("--out", &out, Ours::Page, Existing::Replace)?;
    write(&out, &page::render(&log)?, printer)?;
    let summary = Summary::new(&log, &out);
    if args.json {
        return printer.json(&summary);
    }
    Ok(printer.result(summary.render())?)
}

/// Writes a file that was checked before.
fn write(path: &Path, text: &str, printer: &Printer) -> anyhow::Result<()> {
    write_file(path, text.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))?;
    printer.step("Wrote", path.display());
    Ok(())
}
