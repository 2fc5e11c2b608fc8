//! `--branches`: the share of each branch of a student.

use std::path::Path;

use serde_json::{Value, json};
use still_eval::{BranchShares, branch_shares_of};
use still_model::Model;

use crate::commands::input::read_text;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

/// Tokens of the text that are looked at.
const TOKENS: usize = 2048;

/// Shares by layer and query head, over the beginning of the text in a file.
pub fn measure(
    model: &Model,
    text: &Path,
    printer: &Printer,
) -> anyhow::Result<Vec<Vec<BranchShares>>> {
    let mut tokens = model.tokenizer.encode(&read_text(text)?, true)?;
    tokens.truncate(TOKENS);
    let layers = model.config().num_hidden_layers;
    let bar = Bar::new(printer, "Measuring", "branches", layers, "layers");
    let shares = branch_shares_of(model, &tokens, &|| bar.advance(1))?;
    bar.done(format_args!("branches: {} tokens", tokens.len()));
    Ok(shares)
}

/// Means over a layer's heads.
fn means(heads: &[BranchShares], of: fn(&BranchShares) -> [f64; 3]) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for head in heads {
        sums.iter_mut().zip(of(head)).for_each(|(sum, x)| *sum += x / heads.len() as f64);
    }
    sums
}

/// Layers that a student's attention is in, with their numbers.
fn with_branches(
    layers: &[Vec<BranchShares>],
) -> impl Iterator<Item = (usize, &Vec<BranchShares>)> {
    layers.iter().enumerate().filter(|(_, heads)| !heads.is_empty())
}

/// One row a layer, and their mean.
pub fn render(layers: &[Vec<BranchShares>]) -> String {
    let row = |name: String, heads: &[BranchShares]| {
        let shares = [means(heads, |head| head.mass), means(heads, |head| head.norm)];
        let cells = shares.into_iter().flatten().map(|share| format!("{:.1}", 100.0 * share));
        std::iter::once(name).chain(cells).collect::<Vec<String>>()
    };
    let mut rows: Vec<Vec<String>> =
        with_branches(layers).map(|(n, heads)| row(n.to_string(), heads)).collect();
    rows.push(row("mean".into(), &layers.concat()));
    let headers = [
        "layer",
        "window, % of mass",
        "salient",
        "linear",
        "window, % of output",
        "salient",
        "linear",
    ];
    format!(
        "\n{}\nMass is a branch's part of the softmax's denominator, output the size of what it adds; means over heads and over \
         the tokens from the third chunk on.",
        table::render(&headers, &rows)
    )
}

/// `[{"layer", "mass": [window, salient, linear], "norm": […], "heads": […]}]`
pub fn to_json(layers: &[Vec<BranchShares>]) -> Value {
    let layer = |(n, heads): (usize, &Vec<BranchShares>)| {
        json!({
            "layer": n,
            "mass": means(heads, |head| head.mass),
            "norm": means(heads, |head| head.norm),
            "heads": heads
                .iter()
                .map(|head| json!({ "mass": head.mass, "norm": head.norm }))
                .collect::<Vec<_>>(),
        })
    };
    with_branches(layers).map(layer).collect()
}
