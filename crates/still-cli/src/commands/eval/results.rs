//! Results as a table and as a JSON file.

use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};
use still_eval::run::{Estimate, difference};
use still_eval::task::Metric;
use still_eval::{BranchShares, Interval, PairedBootstrap};
use still_model::files::write_file;

use super::args::Settings;
use super::{Answered, Evaluated, LeftOut, efficiency};
use crate::commands::short_name;
use crate::provenance::Provenance;
use crate::table;

/// A row for every metric: each model's value and standard error, then what the first model has more than each other, with
/// its 95 % interval.
pub fn render(models: &[Evaluated], seed: u64) -> anyhow::Result<String> {
    let Some((first, others)) = models.split_first() else { return Ok(String::new()) };
    if models.len() > MOST_COLUMNS {
        return tall(first, others, seed);
    }
    let mut headers = vec!["task", "metric", "n", "chance"];
    let names: Vec<String> = match others {
        [] => vec!["value".into()],
        _ => models.iter().map(|model| short_name(&model.model)).collect(),
    };
    let minus: Vec<String> =
        names[1..].iter().map(|name| format!("difference to {name}")).collect();
    headers.extend(names.iter().chain(&minus).map(String::as_str));
    if others.is_empty() {
        headers.push("95 % interval");
    }
    let mut rows = Vec::new();
    for (n, task) in first.tasks.iter().enumerate() {
        for (m, &metric) in task.metrics.iter().enumerate() {
            let name = if m == 0 { task.scores.task.clone() } else { String::new() };
            let chance = match (metric, task.scores.chance) {
                (Metric::Perplexity, _) | (_, None) => String::new(),
                (_, Some(chance)) => value(metric, chance),
            };
            let mut row = vec![name, metric.name().into(), task.scores.n.to_string(), chance];
            // An interrupted model has fewer tasks.
            let of_models = models.iter().map(|model| model.tasks.get(n));
            row.extend(of_models.map(|task| task.map_or(String::new(), |task| cell(task, m))));
            for other in others {
                row.push(match other.tasks.get(n) {
                    Some(other) => interval(metric, &compared(task, other, metric, seed)?),
                    None => String::new(),
                });
            }
            if others.is_empty() {
                row.push(ends(&task.scores.metrics[m]));
            }
            rows.push(row);
        }
    }
    let mut text = table::render(&headers, &rows);
    text.push_str("\n\n± is one standard error");
    if others.is_empty() {
        text.push_str("; intervals of shares are Wilson's");
    }
    if !others.is_empty() {
        text.push_str("; differences have their 95 % interval from a paired bootstrap over items");
        if first.tasks.iter().any(|task| task.metrics.contains(&Metric::Perplexity)) {
            text.push_str(", of perplexities in nats of negative log-likelihood");
        }
    }
    text.push('.');
    Ok(text)
}

/// Models that stand side by side; more stand one below the other.
const MOST_COLUMNS: usize = 3;

/// A row for every model: each task's first metric, and what the first model has more.
fn tall(first: &Evaluated, others: &[Evaluated], seed: u64) -> anyhow::Result<String> {
    let mut headers = vec!["model".to_owned()];
    for task in &first.tasks {
        headers.push(format!("{} ({})", task.scores.task, task.metrics[0].name()));
        headers.push("the first has more".into());
    }
    let mut rows = Vec::new();
    for (n, model) in std::iter::once(first).chain(others).enumerate() {
        let mut row = vec![short_name(&model.model)];
        for (task, reference) in model.tasks.iter().zip(&first.tasks) {
            let metric = task.metrics[0];
            row.push(cell(task, 0));
            row.push(match n {
                0 => String::new(),
                _ => interval(metric, &compared(reference, task, metric, seed)?),
            });
        }
        // An interrupted model has fewer tasks.
        row.resize(headers.len(), String::new());
        rows.push(row);
    }
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    Ok(format!(
        "{}\n\n± is one standard error; differences have their 95 % interval from a paired bootstrap over items (of \
         perplexities in nats of negative log-likelihood).",
        table::render(&headers, &rows)
    ))
}

/// `{"model", "recipe", "seed", …, "tasks", "skipped", "compare"}`.
pub fn to_json(
    models: &[Evaluated],
    branches: Option<&[Vec<BranchShares>]>,
    skipped: &[LeftOut],
    settings: &Settings,
) -> anyhow::Result<Value> {
    let Some((first, others)) = models.split_first() else { return Ok(Value::Null) };
    let mut result = json!({
        "model": first.model,
        "student": first.student,
        "base": first.base,
        "recipe": first.recipe,
        "provenance": Provenance::now(&first.model, &settings.place.name),
        "seed": settings.seed,
        "cache_dtype": first.rows.name(),
        "limit": settings.questions.limit,
        "tasks": tasks(first),
        "timing": timing(first),
    });
    add_efficiency(&mut result, first);
    if let Some(layers) = branches {
        result["branches"] = super::branches::to_json(layers);
    }
    if !skipped.is_empty() {
        result["skipped"] = json!(skipped);
    }
    if !others.is_empty() {
        let compared = others.iter().map(|other| -> anyhow::Result<Value> {
            let mut result = json!({
                "model": other.model,
                "student": other.student,
                "base": other.base,
                "recipe": other.recipe,
                "cache_dtype": other.rows.name(),
                "tasks": tasks(other),
                "difference": differences(first, other, settings.seed)?,
                "timing": timing(other),
            });
            if let Some(ablation) = &other.ablation {
                result["ablation"] = json!(ablation);
            }
            if let Some(compression) = &other.compression {
                result["compression"] = json!({
                    "method": compression.method,
                    "fraction": compression.fraction,
                    "sees_question": compression.method.sees_question(),
                });
            }
            add_efficiency(&mut result, other);
            Ok(result)
        });
        result["compare"] = Value::Array(compared.collect::<anyhow::Result<_>>()?);
    }
    Ok(result)
}

/// Writes the results.
///
/// # Errors
/// A disk that cannot be written.
pub fn write(path: &Path, results: &Value) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(results)?;
    text.push('\n');
    write_file(path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

fn tasks(model: &Evaluated) -> Value {
    let task = |task: &Answered| (task.scores.task.clone(), task.scores.to_json());
    Value::Object(model.tasks.iter().map(task).collect())
}

/// By task: tokens read for answers that were not known, and the seconds that took. Apart from the results, which are the same
/// in every run.
fn timing(model: &Evaluated) -> Value {
    let task = |task: &Answered| {
        let (tokens, seconds) = task.read;
        (task.scores.task.clone(), json!({ "tokens": tokens, "seconds": seconds }))
    };
    Value::Object(model.tasks.iter().map(task).collect())
}

fn add_efficiency(result: &mut Value, model: &Evaluated) {
    if !model.efficiency.is_empty() {
        result["efficiency"] = efficiency::to_json(&model.efficiency);
    }
}

/// What `first` has more than `other`, by task and metric; of perplexity in nats.
fn differences(first: &Evaluated, other: &Evaluated, seed: u64) -> anyhow::Result<Value> {
    let mut tasks = Map::new();
    for (task, other) in first.tasks.iter().zip(&other.tasks) {
        let mut metrics = Map::new();
        for &metric in &task.metrics {
            let name = if metric == Metric::Perplexity { "nll" } else { metric.name() };
            metrics.insert(name.into(), json!(compared(task, other, metric, seed)?));
        }
        tasks.insert(task.scores.task.clone(), Value::Object(metrics));
    }
    Ok(Value::Object(tasks))
}

fn compared(a: &Answered, b: &Answered, metric: Metric, seed: u64) -> anyhow::Result<Interval> {
    let bootstrap = PairedBootstrap { seed, ..PairedBootstrap::default() };
    Ok(difference(&a.samples, &b.samples, metric, &bootstrap)?)
}

fn cell(task: &Answered, metric: usize) -> String {
    let (metric, Estimate { value: of, stderr, .. }) = task.scores.metrics[metric];
    match stderr {
        Some(stderr) => format!("{} ± {}", value(metric, of), value(metric, stderr)),
        None => value(metric, of),
    }
}

/// The ends of a value's interval.
fn ends((metric, estimate): &(Metric, Estimate)) -> String {
    estimate.interval.map_or(String::new(), |[low, high]| {
        format!("{} to {}", value(*metric, low), value(*metric, high))
    })
}

/// A value as people read it: shares in per cent.
pub fn value(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Perplexity => format!("{value:.3}"),
        _ => format!("{:.2}", 100.0 * value),
    }
}

fn interval(metric: Metric, interval: &Interval) -> String {
    let Interval { mean, low, high } = *interval;
    match metric {
        Metric::Perplexity => format!("{mean:+.4} [{low:+.4}, {high:+.4}]"),
        _ => format!("{:+.2} [{:+.2}, {:+.2}]", 100.0 * mean, 100.0 * low, 100.0 * high),
    }
}
