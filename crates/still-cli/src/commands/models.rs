//! `still models`: the contents of the caches and their sizes.

use clap::Args;
use serde_json::json;
use still_model::{Cached, CachedKind, DEMO_STUDENT, built_in_names, cached};

use crate::printer::Printer;
use crate::table;

const EXAMPLES: &str = "\
Examples:
  still models
  still models --json";

/// `still models`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ModelsArgs {
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &ModelsArgs, printer: &Printer) -> anyhow::Result<()> {
    let found = cached()?;
    if args.json {
        return printer.json(&json!({ "cached": found }));
    }
    if found.is_empty() {
        printer.note("nothing was fetched yet: `still demo` fetches a model of 94 MiB");
    }
    printer.result(render(&found))?;
    let built_in = built_in_names();
    let student = built_in.last().unwrap_or(&DEMO_STUDENT);
    printer.note(format_args!(
        "built in: {}; {DEMO_STUDENT} is another name of {student}",
        built_in.join(", ")
    ));
    if found.iter().any(|cached| cached.kind == CachedKind::Tokens) {
        printer.note("token ids are made again when they are needed: delete them as you like");
    }
    Ok(())
}

fn render(found: &[Cached]) -> String {
    let mut rows: Vec<Vec<String>> = found
        .iter()
        .map(|cached| {
            vec![cached.name.clone(), kind(cached.kind).into(), table::file_bytes(cached.bytes)]
        })
        .collect();
    rows.push(vec![
        "all".into(),
        String::new(),
        table::file_bytes(found.iter().map(|cached| cached.bytes).sum()),
    ]);
    table::render(&["use it as", "kept", "size"], &rows)
}

fn kind(kind: CachedKind) -> &'static str {
    match kind {
        CachedKind::Model => "model",
        CachedKind::Dataset => "dataset",
        CachedKind::Tokens => "token ids",
    }
}
