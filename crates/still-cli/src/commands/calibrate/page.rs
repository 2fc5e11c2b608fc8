//! The page of `still calibrate --html`: budgets and what decided them, layer by head.

use minijinja::context;
use still_train::{Calibration, HeadReport};

use super::{cost, loss, outlook};
use crate::page;
use crate::plot::{Heatmap, about_layers};
use crate::table;

const TEMPLATE: &str = include_str!("page.html");

/// Renders the page.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(found: &Calibration, model: &str) -> anyhow::Result<String> {
    let whole = found.heads.iter().filter(|head| head.budget == found.budgets.chunk).count();
    let retrieving = found.heads.iter().filter(|head| head.retrieves).count();
    let charts = [
        map(
            found,
            "Budgets",
            "tokens kept of each chunk",
            Some(found.budgets.chunk as f64),
            |head| head.budget as f64,
        ),
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
        outlook::chart(found),
    ];
    page::render(
        TEMPLATE,
        context! {
            model,
            cost => cost(found),
            figures => [
                ("Heads", found.heads.len().to_string()),
                ("Whole", whole.to_string()),
                ("Whole because they retrieve", retrieving.to_string()),
                ("Tokens of text", table::count(found.tokens)),
            ],
            charts,
        },
    )
}

/// A value of every head, a column a layer of the model: one that keeps its attention to a window stays empty. `high` has the
/// deepest shade, the largest value if it is not given.
fn map(
    found: &Calibration,
    title: &str,
    about: &str,
    high: Option<f64>,
    value: impl Fn(&HeadReport) -> f64,
) -> String {
    let mut columns = vec![Vec::new(); found.budgets.budgets.len()];
    found.heads.iter().for_each(|head| columns[head.layer].push(value(head)));
    let high = high.unwrap_or_else(|| columns.iter().flatten().copied().fold(0.0, f64::max));
    Heatmap {
        title: title.into(),
        about: about_layers(about, &columns),
        x: "layer".into(),
        y: "head".into(),
        columns,
        low: 0.0,
        high,
    }
    .html()
}
