//! Results of `still eval --json` of one or several models, side by side.

mod ablations;
mod charts;
mod page;
mod results;
mod tables;

use std::path::PathBuf;

use serde_json::json;

use self::results::Results;
pub use self::tables::NOTE as MARKDOWN_NOTE;
use super::write;
use crate::args::ReportArgs;
use crate::errors::user;
use crate::outputs::{Existing, Ours, Outputs};
use crate::printer::Printer;

/// Draws the page, and writes and prints the tables.
pub fn run(args: &ReportArgs, printer: &Printer) -> anyhow::Result<()> {
    let out = args.out.clone().unwrap_or_else(|| args.paths[0].with_extension("html"));
    let mut outputs = Outputs::default();
    // First: a result among the inputs is not a page either, but that is not what is wrong.
    outputs.spare(args.paths.iter().map(PathBuf::as_path))?;
    outputs.file("--out", &out, Ours::Page, Existing::Replace)?;
    if let Some(path) = &args.markdown {
        outputs.file("--markdown", path, Ours::Markdown, Existing::Replace)?;
    }
    let results = Results::read(&args.paths)?;
    if results.tasks().is_empty() && tables::efficiency(&results).is_none() {
        return Err(user(
            format!("{} holds no result", args.paths[0].display()),
            "name a file of a `still eval` that asked a task",
        ));
    }
    write(&out, &page::render(&results)?, printer)?;
    if let Some(path) = &args.markdown {
        write(path, &markdown(&results), printer)?;
    }
    if args.json {
        let text = |path: &PathBuf| path.display().to_string();
        let (report, markdown) = (text(&out), args.markdown.as_ref().map(text));
        return printer.json(
            &json!({ "report": report, "markdown": markdown, "subjects": results.subjects }),
        );
    }
    let tables = tables::all(&results).into_iter().map(|(_, table)| table.text());
    Ok(printer.result(tables.collect::<Vec<_>>().join("\n\n"))?)
}

fn markdown(results: &Results) -> String {
    let part =
        |(title, table): (&str, tables::Table)| format!("## {title}\n\n{}", table.markdown());
    let parts: Vec<String> = tables::all(results).into_iter().map(part).collect();
    format!("{}\n{}\n", parts.join("\n"), tables::NOTE)
}
