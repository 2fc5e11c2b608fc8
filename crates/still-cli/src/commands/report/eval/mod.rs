//! `still report eval`: results of `still eval --out` of one or several models, side by side.

mod ablations;
mod charts;
mod page;
mod results;
mod tables;
mod verdict;

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use self::results::Results;
use super::write;
use crate::errors::user;
use crate::outputs::{Existing, OutputKind, Outputs, TABLES_NOTE};
use crate::printer::Printer;
use crate::shown::in_shell;

const EXAMPLES: &str = "\
Examples:
  still report eval results.json
  still report eval long.json short.json --out page.html --markdown t.md";

/// `still report eval`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalReportArgs {
    /// Files that `still eval --out` wrote, of one or several models
    #[arg(value_name = "EVAL.json", required = true, num_args = 1..)]
    paths: Vec<PathBuf>,
    /// The page to write [default: the first EVAL.json with .html for .json]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the table of evaluations here too, as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Print one JSON object on stdout instead of the tables
    #[arg(long)]
    json: bool,
}

/// What is drawn, and where.
#[derive(Debug)]
pub struct Settings {
    paths: Vec<PathBuf>,
    out: PathBuf,
    markdown: Option<PathBuf>,
    json: bool,
}

impl EvalReportArgs {
    /// The page next to the first results, unless another is asked for.
    pub fn resolve(self) -> Settings {
        let out = self.out.unwrap_or_else(|| self.paths[0].with_extension("html"));
        Settings { paths: self.paths, out, markdown: self.markdown, json: self.json }
    }
}

/// Draws the page, and writes and prints the tables.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let Settings { paths, out, markdown: table, json } = settings;
    if let Some(dir) = paths.iter().find(|path| path.is_dir()) {
        return Err(user(
            format!("{} is a directory, not a file that `still eval --out` wrote", dir.display()),
            format!("draw a run with `still report run {}`", in_shell(dir)),
        ));
    }
    let mut outputs = Outputs::default();
    // First: a result among the inputs is not a page either, but that is not what is wrong.
    outputs.spare(paths.iter().map(PathBuf::as_path))?;
    outputs.file("--out", out, OutputKind::Page, Existing::Replace)?;
    if let Some(path) = table {
        outputs.file("--markdown", path, OutputKind::Markdown, Existing::Replace)?;
    }
    let results = Results::read(paths)?;
    if results.tasks().is_empty() && tables::efficiency(&results).is_none() {
        return Err(user(
            format!("{} holds no result", paths[0].display()),
            "name a file of a `still eval` that asked a task",
        ));
    }
    write(out, &page::render(&results)?, printer)?;
    if let Some(path) = table {
        write(path, &markdown(&results), printer)?;
    }
    if *json {
        let text = |path: &PathBuf| path.display().to_string();
        let (report, markdown) = (text(out), table.as_ref().map(text));
        return printer.json(
            &json!({ "report": report, "markdown": markdown, "verdicts": verdict::all(&results), "subjects": results.subjects }),
        );
    }
    let verdicts = verdict::all(&results).into_iter().map(|verdict| verdict.text());
    let tables = tables::all(&results).into_iter().map(|(_, table)| table.text());
    Ok(printer.result(verdicts.chain(tables).collect::<Vec<_>>().join("\n\n"))?)
}

/// The tables of results, as Markdown.
///
/// # Errors
/// A file that is no result of `still eval --out`.
pub fn tables_of(paths: &[PathBuf]) -> anyhow::Result<String> {
    Ok(markdown(&Results::read(paths)?))
}

fn markdown(results: &Results) -> String {
    let part =
        |(title, table): (&str, tables::Table)| format!("## {title}\n\n{}", table.markdown());
    let parts: Vec<String> = tables::all(results).into_iter().map(part).collect();
    format!("{}\n{}\n", parts.join("\n"), TABLES_NOTE)
}
