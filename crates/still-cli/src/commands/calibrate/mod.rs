//! `still calibrate`: a budget for every head.

mod args;
mod outlook;
mod page;

use std::path::{Path, PathBuf};

use anyhow::Context;
use still_model::files::write_file;
use still_train::{CalibrateOptions, Calibration, HeadReport, TokenCache, Windows};

pub use self::args::CalibrateArgs;
use self::args::Settings;
use super::calibration_bars::calibrate;
use crate::outputs::{Ours, Outputs};
use crate::printer::Printer;
use crate::table;

/// Runs the command.
pub fn run(settings: &Settings, printer: &Printer) -> anyhow::Result<()> {
    let mut outputs = Outputs::default();
    let inputs =
        settings.inputs.data.iter().chain(&settings.inputs.recipe_file).map(PathBuf::as_path);
    outputs.spare(inputs.chain([Path::new(&settings.inputs.model)]))?;
    if let Some(out) = &settings.out {
        outputs.file("--out", out, Ours::Budgets, settings.existing)?;
    }
    if let Some(html) = &settings.html {
        outputs.file("--html", html, Ours::Page, settings.existing)?;
    }
    let model = settings.inputs.load("calibrate", printer)?;
    let (recipe, calibration) = (&settings.inputs.recipe, &settings.calibration);
    let data = calibration.text(&recipe.data);
    let cache = TokenCache::user()?;
    let text = Windows::read(&settings.inputs.data, &model.tokenizer, &data, recipe.seed, &cache)?
        .first_tokens(calibration.tokens);
    let at_length = calibration.at_length;
    let usual = CalibrateOptions::usual_cache_fraction(model.config(), at_length);
    let options = calibration.options_at(calibration.cache_fraction.unwrap_or(usual), recipe.seed);
    let found = calibrate(&model, &recipe.attention, &text, &options, printer)?;
    if let Some(out) = &settings.out {
        found.budgets.save(out)?;
        printer.step("Saved", out.display());
    }
    if let Some(html) = &settings.html {
        write_file(html, page::render(&found, &settings.inputs.model)?.as_bytes())
            .with_context(|| format!("cannot write {}", html.display()))?;
        printer.step("Wrote", html.display());
    }
    if settings.json { printer.json(&found) } else { Ok(printer.result(render(&found))?) }
}

/// One row a layer: the heads' budgets, `*` where a head is whole because it retrieves, and a bar of what they take.
fn render(found: &Calibration) -> String {
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
        "{}\n{}\n\
         * whole because it retrieves. Losses are estimates, nats a token, from {} tokens of text.\n\n\
         Other shares of the dense cache in bf16, whole heads and estimated loss of all (what narrow rows lose is not in it):\n\n{}",
        table::render(&headers, &rows),
        cost(found),
        found.tokens,
        outlook::render(found),
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
        budgets.at_length,
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
