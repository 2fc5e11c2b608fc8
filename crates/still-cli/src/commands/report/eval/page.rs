//! The HTML page of results.

use minijinja::context;

use super::results::{Results, Subject};
use super::{ablations, charts, tables, verdict};
use crate::outputs::TABLES_NOTE;
use crate::page;

const TEMPLATE: &str = include_str!("page.html");

/// Renders the page.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(results: &Results) -> anyhow::Result<String> {
    let names: Vec<String> = results.models().map(Subject::label).collect();
    let mut figures = vec![
        ("Models", names.len().to_string()),
        ("Tasks", results.tasks().len().to_string()),
        ("Answers", crate::table::count(answers(results))),
    ];
    let variants = results.variants().count();
    if variants > 0 {
        figures.push(("Variants", variants.to_string()));
    }
    figures.extend(results.settings.iter().map(|(name, values)| (*name, values.join(", "))));
    let table = |title: &str| {
        tables::all(results).into_iter().find(|(name, _)| *name == title).map(|(_, table)| table)
    };
    page::render(
        TEMPLATE,
        context! {
            title => names.join(", "),
            made => page::made(&results.made),
            verdicts => verdict::all(results),
            figures,
            note => TABLES_NOTE,
            results => table("Results"),
            differences => table("Differences"),
            efficiency => table("Efficiency"),
            against_bytes => charts::against_bytes(results),
            bars => charts::bars(results),
            lengths => charts::lengths(results),
            parts => ablations::parts(results),
            speed => charts::efficiency(results),
        },
    )
}

/// Items that were answered, of all models and tasks.
fn answers(results: &Results) -> usize {
    let of = |subject: &Subject| subject.tasks.iter().map(|(_, task)| task.n).sum::<usize>();
    results.subjects.iter().map(of).sum()
}
