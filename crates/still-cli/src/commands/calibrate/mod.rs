//! `still calibrate`: a budget for every head.

mod args;
mod outlook;
mod page;
mod pass_keys;

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use still_model::files::write_file;
use still_train::{CalibrateOptions, Calibration, HeadReport, TokenCache, Windows};

pub use self::args::CalibrateArgs;
use self::args::Settings;
use self::pass_keys::PassKeys;
use super::calibration_bars::calibrate;
use crate::outputs::{OutputKind, Outputs};
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table::{self, WIDTH};
use crate::wrap::wrapped;

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let mut outputs = Outputs::default();
    let inputs =
        settings.inputs.data.iter().chain(&settings.inputs.recipe_file).map(PathBuf::as_path);
    outputs.spare(inputs.chain([Path::new(&settings.inputs.model)]))?;
    if let Some(out) = &settings.out {
        outputs.file("--out", out, OutputKind::Budgets, settings.existing)?;
    }
    if let Some(html) = &settings.html {
        outputs.file("--html", html, OutputKind::Page, settings.existing)?;
    }
    let model = settings.inputs.load("calibrate", printer)?;
    let (recipe, calibration) = (&settings.inputs.recipe, &settings.calibration);
    let data = calibration.text(&recipe.data);
    let cache = TokenCache::user()?;
    let bar = Bar::new(printer, "Reading", "the text", 0, "");
    let text = Windows::read(&settings.inputs.data, &model.tokenizer, &data, recipe.seed, &cache)?
        .first_tokens(calibration.tokens);
    drop(bar);
    let at_length = calibration.at_length;
    let usual = CalibrateOptions::usual_cache_fraction(model.config(), at_length);
    let options = calibration.options_at(calibration.cache_fraction.unwrap_or(usual), recipe.seed);
    let found = calibrate(&model, &recipe.attention, &text, &options, printer)?;
    // Before the rest, which may be interrupted.
    if let Some(out) = &settings.out {
        found.budgets.save(out)?;
        printer.step("Saved", out.display());
    }
    let keys =
        pass_keys::measure(&model, &recipe.attention, &found, settings.keys, recipe.seed, printer)?;
    if let Some(html) = &settings.html {
        let page = page::render(&found, keys.as_ref(), &settings.inputs)?;
        write_file(html, page.as_bytes())
            .with_context(|| format!("cannot write {}", html.display()))?;
        printer.step("Wrote", html.display());
    }
    if settings.json {
        return printer.json(&Output { found: &found, pass_keys: keys.as_ref() });
    }
    Ok(printer.result(render(&found, keys.as_ref()))?)
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    found: &'a Calibration,
    /// None if no keys were asked for.
    pass_keys: Option<&'a PassKeys>,
}

/// One row a layer: the heads' budgets, `*` where a head is whole because it retrieves, and a bar of what they take.
fn render(found: &Calibration, keys: Option<&PassKeys>) -> String {
    let chunk = found.budgets.chunk;
    let layers = found.heads.chunk_by(|a, b| a.layer == b.layer);
    let rows: Vec<Vec<String>> = layers
        .map(|heads| {
            let budget = |head: &HeadReport| {
                format!("{:>3}{}", head.budget, if head.retrieves { "*" } else { " " })
            };
            let strongest = heads.iter().map(|head| head.retrieval).fold(0.0, f64::max);
            vec![
                heads[0].layer.to_string(),
                heads.iter().map(budget).collect(),
                heads.iter().map(|head| shade(head.budget, chunk)).collect(),
                format!("{strongest:.2}"),
                format!("{:.4}", heads.iter().map(|head| loss(found, head)).sum::<f64>()),
            ]
        })
        .collect();
    let headers = ["layer", "kept of each chunk", "plot", "retrieval", "loss, nats"];
    format!(
        "{}\n{}\n{}\n\n{}\n\n{}",
        table::render(&headers, &rows),
        wrapped(&cost(found), WIDTH),
        wrapped(
            &format!(
                "* whole because it retrieves. Losses are estimates, nats a token, from {} tokens of text.",
                table::count(found.tokens)
            ),
            WIDTH
        ),
        wrapped(&about_shares(found, keys), WIDTH),
        outlook::render(found, keys),
    )
}

/// What the table of other shares says.
fn about_shares(found: &Calibration, keys: Option<&PassKeys>) -> String {
    let asked = keys.map_or_else(String::new, |keys| {
        format!(
            " Keys: pass keys of {} tokens that an untrained student with rows in {} finds; its teacher finds {} of {}.",
            table::count(keys.length),
            found.budgets.rows,
            keys.teacher,
            keys.keys
        )
    });
    format!(
        "Other shares of the dense cache in bf16: whole heads and the estimated loss of all heads, by how rows are stored (what \
         narrow rows lose is not in it).{asked}"
    )
}

/// What the budgets take and give, in a sentence.
fn cost(found: &Calibration) -> String {
    let (budgets, chunk) = (&found.budgets, found.budgets.chunk);
    let share = found.cache_bytes as f64 / found.dense_bytes as f64;
    let uniform = match found.uniform_budget {
        Some(budget) => format!("{budget} of {chunk} everywhere takes about as much"),
        None => "no uniform budget takes so little".into(),
    };
    let whole = found.heads.iter().filter(|head| head.budget == chunk).count();
    let least = found.heads.iter().map(|head| head.budget).min().unwrap_or(0);
    format!(
        "{} at {} tokens with rows in {}, {:.1} % of the dense cache in bf16; {whole} of {} heads keep all tokens, every head at \
         least {least} of {chunk}; {uniform}.\nIt holds {}.",
        table::bytes(found.cache_bytes),
        table::count(budgets.at_length),
        budgets.rows,
        100.0 * share,
        found.heads.len(),
        table::parts(&found.cache_parts),
    )
}

/// The estimated loss of what a head was given.
fn loss(found: &Calibration, head: &HeadReport) -> f64 {
    let taken = found.candidates.iter().position(|&budget| budget == head.budget);
    taken.map_or(0.0, |taken| head.losses[taken])
}

/// One character for a budget: the darker the more.
fn shade(budget: usize, chunk: usize) -> char {
    const SHADES: [char; 6] = ['·', '░', '▒', '▓', '█', '█'];
    if budget == 0 {
        return SHADES[0];
    }
    // By powers of four of the share that is kept.
    let steps = (budget as f64 / chunk as f64).log(4.0);
    SHADES[(4.0 + steps).clamp(1.0, 4.0).round() as usize]
}
