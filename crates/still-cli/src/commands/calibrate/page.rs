//! The page of `still calibrate --html`: budgets and their reasons, layer by head.

use minijinja::context;
use still_train::{Calibration, HeadReport};

use super::pass_keys::PassKeys;
use super::{about_shares, cost, loss, outlook};
use crate::commands::short_name;
use crate::commands::training::Inputs;
use crate::page;
use crate::plot::{Heatmap, Scale, about_layers, number};
use crate::provenance::Provenance;
use crate::table;

const TEMPLATE: &str = include_str!("page.html");

/// Renders the page.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(
    found: &Calibration,
    keys: Option<&PassKeys>,
    inputs: &Inputs,
) -> anyhow::Result<String> {
    let whole = found.heads.iter().filter(|head| head.budget == found.budgets.chunk).count();
    let retrieving = found.heads.iter().filter(|head| head.retrieves).count();
    let maps = [
        map(found, "Budgets", "tokens kept of each chunk", None, |head| head.budget as f64),
        map(
            found,
            "Retrieval",
            "attention to the matching token of a random sequence fed twice",
            Some(1.0),
            |head| head.retrieval,
        ),
        map(found, "Loss left", "estimate, nats a token, at the head's budget", None, |head| {
            loss(found, head)
        }),
        map(found, "Loss with nothing kept", "estimate, nats a token, at budget 0", None, |head| {
            head.losses.first().copied().unwrap_or(0.0)
        }),
    ];
    let (headers, shares) = outlook::table(found, keys);
    page::render(
        TEMPLATE,
        context! {
            model => short_name(&inputs.model),
            made => page::made(&[Provenance::now(&inputs.model, &inputs.place.name)]),
            recommendation => outlook::recommendation(found, keys),
            cost => cost(found),
            figures => [
                ("Cache", table::bytes(found.cache_bytes)),
                ("Of the dense cache", format!("{:.1} %", 100.0 * found.cache_bytes as f64 / found.dense_bytes as f64)),
                ("At", format!("{} tokens", table::count(found.budgets.at_length))),
                ("Rows", found.budgets.rows.to_string()),
                ("Heads", found.heads.len().to_string()),
                ("Whole", whole.to_string()),
                ("Whole because they retrieve", retrieving.to_string()),
                ("Tokens of text", table::count(found.tokens)),
            ],
            maps,
            whole_heads => whole_heads(found),
            charts => outlook::charts(found, keys),
            about_shares => about_shares(found, keys),
            headers,
            shares,
            costs => found.outlook.iter().map(|rows| outlook::sentence(found, rows)).collect::<Vec<_>>(),
        },
    )
}

/// A row for every head that keeps all tokens, the strongest in retrieval first: where it is, why, what it costs, what it saves.
fn whole_heads(found: &Calibration) -> Vec<[String; 6]> {
    let chunk = found.budgets.chunk;
    let mut whole: Vec<&HeadReport> =
        found.heads.iter().filter(|head| head.budget == chunk).collect();
    whole.sort_by(|a, b| b.retrieval.total_cmp(&a.retrieval));
    // Every head has at least the smallest budget that holds its sink, wherever one is whole.
    let sink = usize::from(found.candidates.len() > 2);
    let bytes = found.own_outlook().map_or(0, |own| own.whole_head_bytes);
    let row = |head: &HeadReport| {
        [
            head.layer.to_string(),
            head.head.to_string(),
            if head.retrieves { "it retrieves" } else { "the text needs it" }.into(),
            number(head.retrieval),
            number(head.losses.get(sink).copied().unwrap_or(f64::NAN)),
            table::bytes(bytes),
        ]
    };
    whole.into_iter().map(row).collect()
}

/// A value of every head, a column a layer of the model: one that keeps its attention to a window stays empty. `high` has the
/// deepest shade, on a linear scale; without it the largest value has, on a logarithmic one where it is far above the others.
fn map(
    found: &Calibration,
    title: &str,
    about: &str,
    high: Option<f64>,
    value: impl Fn(&HeadReport) -> f64,
) -> String {
    let mut columns = vec![Vec::new(); found.budgets.budgets.len()];
    found.heads.iter().for_each(|head| columns[head.layer].push(value(head)));
    let largest = columns.iter().flatten().copied().fold(0.0, f64::max);
    Heatmap {
        title: title.into(),
        about: about_layers(about, &columns),
        x: "layer".into(),
        y: "head".into(),
        scale: if high.is_some() { Scale::Linear } else { Heatmap::fitting(&columns) },
        columns,
        low: 0.0,
        high: high.unwrap_or(largest),
    }
    .html()
}
