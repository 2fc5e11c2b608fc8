//! Results as tables, for a terminal, a page or Markdown.

use serde::Serialize;
use still_eval::Interval;

use super::results::{Difference, Results, Subject, Value};
use crate::table;

/// Headers and rows.
#[derive(Debug, Serialize)]
pub struct Table {
    /// Of the columns.
    pub headers: Vec<String>,
    /// Cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new<'a>(headers: impl IntoIterator<Item = &'a str>) -> Self {
        Self { headers: headers.into_iter().map(str::to_owned).collect(), rows: Vec::new() }
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let headers: Vec<&str> = self.headers.iter().map(String::as_str).collect();
        table::render(&headers, &self.rows)
    }

    /// As Markdown, numbers to the right.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut text = line(&self.headers);
        text.push_str("|---|");
        text.push_str(&"---:|".repeat(self.headers.len() - 1));
        text.push('\n');
        self.rows.iter().for_each(|row| text.push_str(&line(row)));
        text
    }
}

/// Every table that has something to say, with its title.
pub fn all(results: &Results) -> Vec<(&'static str, Table)> {
    let tables = [
        ("Results", (!results.tasks().is_empty()).then(|| scores(results))),
        ("Differences", differences(results)),
        ("Variants", variants(results)),
        ("Efficiency", efficiency(results)),
    ];
    tables.into_iter().filter_map(|(title, table)| Some((title, table?))).collect()
}

/// A value as people read it: shares in per cent.
pub fn shown(metric: &str, value: f64) -> String {
    match metric {
        "perplexity" => format!("{value:.3}"),
        _ => format!("{:.2}", 100.0 * value),
    }
}

/// A value and its interval.
pub fn cell(value: &Value) -> String {
    let number = shown(value.metric, value.value);
    match (value.metric, value.interval) {
        (_, None) => number,
        ("perplexity", Some([low, high])) => format!("{number} [{low:.2}, {high:.2}]"),
        (_, Some([low, high])) => format!("{number} [{:.1}, {:.1}]", 100.0 * low, 100.0 * high),
    }
}

/// A row for every task and metric, a column for every model.
fn scores(results: &Results) -> Table {
    let models: Vec<&Subject> = results.models().collect();
    let names: Vec<String> = models.iter().map(|model| model.label()).collect();
    let names = names.iter().map(String::as_str);
    let mut table = Table::new(["task", "metric", "n", "chance"].into_iter().chain(names));
    for (task, any) in results.tasks() {
        for (m, Value { metric, .. }) in any.values().into_iter().enumerate() {
            let of_models: Vec<_> = models.iter().map(|model| model.task(task)).collect();
            let mut counts: Vec<String> =
                of_models.iter().flatten().map(|result| result.n.to_string()).collect();
            counts.dedup();
            let chance = any.chance.filter(|_| metric != "perplexity");
            let mut row = vec![
                if m == 0 { task.to_owned() } else { String::new() },
                metric.to_owned(),
                counts.join(", "),
                chance.map_or_else(|| "–".into(), |chance| shown(metric, chance)),
            ];
            row.extend(of_models.into_iter().map(|result| {
                let values = result.map(|result| result.values()).unwrap_or_default();
                let value = values.iter().find(|value| value.metric == metric);
                value.map_or_else(|| "–".into(), cell)
            }));
            table.rows.push(row);
        }
    }
    table
}

/// A row for every variant of `--ablate`, a column for every task; none without variants.
fn variants(results: &Results) -> Option<Table> {
    let tasks = results.tasks();
    let mut table = Table::new(std::iter::once("variant"));
    for (task, any) in &tasks {
        let metric = any.first().map_or("", |value| value.metric);
        table.headers.push(format!("{task} ({metric})"));
    }
    for variant in results.variants() {
        let mut row = vec![variant.name.clone()];
        row.extend(tasks.iter().map(|(task, _)| {
            let value = variant.task(task).and_then(super::results::TaskResult::first);
            value.as_ref().map_or_else(|| "–".into(), cell)
        }));
        table.rows.push(row);
    }
    (!table.rows.is_empty()).then_some(table)
}

/// A row for every model (and variant) and length; none where nothing was timed.
pub fn efficiency(results: &Results) -> Option<Table> {
    let mut table = Table::new([
        "model",
        "tokens",
        "prefill tokens/s",
        "decode tokens/s",
        "cache",
        "fixed",
        "per token",
        "threads",
    ]);
    let bytes = |bytes: Option<f64>| {
        bytes.map_or_else(|| "–".into(), |bytes| table::bytes(bytes.max(0.0).round() as usize))
    };
    for subject in &results.subjects {
        let Some(efficiency) = &subject.efficiency else { continue };
        for point in &efficiency.points {
            table.rows.push(vec![
                subject.label(),
                point.context.to_string(),
                format!("{:.0}", point.prefill_tokens_per_s),
                format!("{:.1}", point.decode_tokens_per_s),
                table::bytes(point.cache_bytes),
                bytes(efficiency.fixed_bytes),
                bytes(efficiency.bytes_per_token),
                efficiency.threads.to_string(),
            ]);
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

/// A row for every task and metric, a column for every pair of a file's first model and another, variants aside; none without
/// others.
fn differences(results: &Results) -> Option<Table> {
    let pairs: Vec<&Difference> =
        results.differences.iter().filter(|pair| pair.ablation.is_none()).collect();
    let names: Vec<String> =
        pairs.iter().map(|pair| format!("{} − {}", pair.first, pair.other)).collect();
    let names = names.iter().map(String::as_str);
    let mut table = Table::new(["task", "metric"].into_iter().chain(names));
    for (task, _) in results.tasks() {
        let of_pairs: Vec<_> = pairs.iter().map(|pair| pair.task(task)).collect();
        let mut metrics: Vec<&str> = Vec::new();
        for (metric, _) in of_pairs.iter().copied().flatten() {
            if !metrics.contains(&metric.as_str()) {
                metrics.push(metric);
            }
        }
        for (m, &metric) in metrics.iter().enumerate() {
            let first = if m == 0 { task.to_owned() } else { String::new() };
            let mut row = vec![first, metric.to_owned()];
            row.extend(of_pairs.iter().map(|of| {
                let found = of.iter().find(|(name, _)| name == metric);
                found.map_or_else(|| "–".into(), |(_, interval)| signed(metric, interval))
            }));
            table.rows.push(row);
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

/// A difference and its interval: shares in points, `nll` in nats.
fn signed(metric: &str, interval: &Interval) -> String {
    let Interval { mean, low, high } = *interval;
    match metric {
        "nll" => format!("{mean:+.4} [{low:+.4}, {high:+.4}]"),
        _ => format!("{:+.2} [{:+.2}, {:+.2}]", 100.0 * mean, 100.0 * low, 100.0 * high),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_has_its_columns_whatever_a_cell_holds() {
        let mut table = Table::new(["task", "a|b"]);
        table.rows.push(vec!["piqa".into(), "1".into()]);
        assert_eq!(table.markdown(), "| task | a\\|b |\n|---|---:|\n| piqa | 1 |\n");
    }
}
