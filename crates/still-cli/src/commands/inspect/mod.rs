//! `still inspect`: which tokens each layer and head keeps, and why.

mod page;
mod routing;
mod summary;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use still_model::files::write_file;

use self::routing::route;
use super::input::read_text_once;
use super::model::{ModelArg, Place, load};
use super::short_name;
use crate::args::{TOKENS, whole};
use crate::errors::user;
use crate::outputs::{Existing, OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::Bar;

const EXAMPLES: &str = "\
Examples:
  still inspect --model my-student --text article.txt --html saliency.html
  still inspect --model org/name --text article.txt --budget 8 --json";

/// `still inspect`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// The model.
    #[command(flatten)]
    model: ModelArg,
    /// Text to read
    #[arg(long, short, value_name = "FILE")]
    text: PathBuf,
    /// Draw what each head keeps as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Read at most this many tokens of the text
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = whole(0, TOKENS))]
    max_tokens: usize,
    /// Tokens kept of each chunk of 64, for a model that is not a student yet
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = whole(0, TOKENS))]
    budget: usize,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &InspectArgs, printer: &Printer) -> anyhow::Result<()> {
    let text = read_text_once(&args.text, printer)?;
    if let Some(html) = &args.html {
        let mut outputs = Outputs::default();
        outputs.spare([args.text.as_path(), Path::new(&args.model.model)])?;
        outputs.file("--html", html, OutputKind::Page, Existing::Replace)?;
    }
    let model = load(&args.model.model, &Place::cpu(), printer)?;
    let bar = Bar::new(printer, "Reading", "the text", 0, "");
    let mut ids = model.tokenizer.encode(&text, true)?;
    drop(bar);
    if ids.is_empty() || args.max_tokens == 0 {
        return Err(user(
            "there are no tokens to look at",
            "give a text, and --max-tokens above 0",
        ));
    }
    if ids.len() > args.max_tokens {
        printer.warn(format_args!(
            "the text has {} tokens; the first {} are read (--max-tokens)",
            ids.len(),
            args.max_tokens
        ));
        ids.truncate(args.max_tokens);
    }
    let layers = model.decoder.layers.len();
    let bar = Bar::new(printer, "Routing", "layers", layers, "layers");
    let routing = route(&model, &ids, args.budget, &mut |layers| bar.advance(layers))?;
    bar.done(format_args!("{} tokens through {layers} layers", ids.len()));
    if let Some(path) = &args.html {
        let bar = Bar::new(printer, "Writing", "the page", 0, "");
        let (model, text) = (short_name(&args.model.model), args.text.display().to_string());
        write_file(path, page::render(&routing, &model, &text)?.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        drop(bar);
        printer.step("Wrote", path.display());
    }
    if args.json {
        return printer.json(&summary::Summary::new(&routing));
    }
    Ok(printer.result(summary::Summary::new(&routing).render())?)
}
