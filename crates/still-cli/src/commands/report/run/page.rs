//! The HTML page of a run.

use serde::Serialize;

use super::charts;
use super::settings::{self, Budgets};
use super::summary::{Stage, metric, metric_names, stages, steps_words};
use crate::commands::short_name;
use crate::page;
use crate::plot::number;
use crate::run_log::{Evaluation, RunLog, StageLog, metric_words};
use crate::table;
use crate::verdict::{Sample, Verdict, lines};

const TEMPLATE: &str = include_str!("page.html");

/// What the template fills in. Fields named `charts`, and `budget_map`, are HTML already.
#[derive(Serialize)]
struct Data<'a> {
    run: String,
    made: Vec<(&'static str, String)>,
    verdict: Option<Judgement>,
    figures: Vec<(&'a str, String)>,
    stages: Vec<StagePart>,
    evaluations: Option<Evaluations>,
    layers: Option<Layers>,
    attention: Vec<(String, String)>,
    budgets: Option<String>,
    budget_map: Option<String>,
    recipe: Option<&'a str>,
}

#[derive(Serialize)]
struct Judgement {
    sentence: String,
    /// Of the table: nothing, then the models.
    columns: Vec<String>,
    /// A line of cells for each measurement.
    rows: Vec<Vec<String>>,
    measured: String,
    samples: Vec<Sample>,
    next: Vec<String>,
}

#[derive(Serialize)]
struct StagePart {
    title: String,
    charts: Vec<String>,
    skipped: Vec<[String; 3]>,
}

#[derive(Serialize)]
struct Evaluations {
    charts: Vec<String>,
    metrics: Vec<String>,
    rows: Vec<EvaluationRow>,
}

#[derive(Serialize)]
struct EvaluationRow {
    best: bool,
    teacher: bool,
    cells: Vec<String>,
    remark: &'static str,
}

#[derive(Serialize)]
struct Layers {
    charts: Vec<String>,
    rows: Vec<[String; 4]>,
}

/// Renders the page.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(log: &RunLog) -> anyhow::Result<String> {
    let recipe = log.recipe.as_ref().map(|(text, table)| (text.as_str(), table));
    let table = recipe.map(|(_, table)| table);
    let budgets = table.and_then(Budgets::of);
    let chunk = table.and_then(settings::chunk);
    let done = stages(log);
    let data = Data {
        run: log.dir.display().to_string(),
        made: page::made(&log.starts),
        verdict: log.verdict.as_ref().map(judgement),
        figures: figures(log, &done),
        stages: log.stages.iter().zip(&done).map(|(stage, done)| part(stage, done)).collect(),
        evaluations: (!log.evaluations.is_empty()).then(|| evaluations(log)),
        layers: layers(log),
        attention: table.map(settings::attention).unwrap_or_default(),
        budgets: budgets.as_ref().map(|budgets| budgets.words(chunk)),
        budget_map: budgets.as_ref().and_then(|budgets| budgets.heatmap(chunk)),
        recipe: recipe.map(|(text, _)| text.trim_end()),
    };
    page::render(TEMPLATE, data)
}

fn judgement(verdict: &Verdict) -> Judgement {
    Judgement {
        sentence: verdict.sentence.clone(),
        columns: std::iter::once(String::new())
            .chain(verdict.rows.iter().map(|row| row.model.clone()))
            .collect(),
        rows: lines(&verdict.rows),
        measured: verdict.measured().replace('\n', " "),
        samples: verdict.samples.clone(),
        // This page is that look.
        next: verdict
            .next
            .iter()
            .filter(|line| !line.starts_with("look at the run:"))
            .cloned()
            .collect(),
    }
}

fn figures(log: &RunLog, stages: &[Stage]) -> Vec<(&'static str, String)> {
    let mut figures = Vec::new();
    if let Some(start) = log.starts.first() {
        figures.push(("Teacher", short_name(&start.model)));
    }
    let steps: Vec<String> =
        stages.iter().map(|stage| format!("{} {}", steps_words(stage), stage.stage)).collect();
    figures.push(("Steps", steps.join(", ")));
    figures.push(("Tokens", table::count(log.tokens())));
    let seconds: Option<f64> = stages.iter().map(|stage| stage.seconds).sum();
    if let Some(seconds) = seconds {
        figures.push(("Time of all steps", table::seconds(seconds)));
    }
    figures.push((
        "Skipped steps",
        stages.iter().map(|stage| stage.skipped).sum::<usize>().to_string(),
    ));
    for stage in stages {
        if let (Some(first), Some(last)) = (stage.first_loss, stage.last_loss) {
            let name = if stage.stage == "transfer" { "Transfer loss" } else { "Finetune loss" };
            figures.push((name, format!("{} → {}", number(first), number(last))));
        }
    }
    if let Some(best) = log.best() {
        let metric = best.metrics().next();
        let value = metric.map_or_else(String::new, |(name, value)| {
            format!(": {} {}", metric_words(name), number(value))
        });
        figures.push(("Best", format!("{} step {}{value}", best.stage, best.step)));
    }
    figures
}

fn part(stage: &StageLog, done: &Stage) -> StagePart {
    let title = match stage.name.as_str() {
        "transfer" => "Attention transfer",
        "finetune" => "Low-rank finetuning",
        other => other,
    };
    let skipped = stage
        .skipped()
        .map(|step| [step.step.to_string(), number(step.loss), number(step.grad_norm)]);
    StagePart {
        title: format!(
            "{title}: {} steps, {} tokens",
            steps_words(done),
            table::count(done.tokens)
        ),
        charts: charts::of_stage(stage),
        skipped: skipped.collect(),
    }
}

fn evaluations(log: &RunLog) -> Evaluations {
    let names = metric_names(&log.evaluations);
    let best = log.best();
    let row = |evaluation: &Evaluation| {
        let mut cells = vec![evaluation.stage.clone(), evaluation.step.to_string()];
        cells.extend(names.iter().map(|name| metric(evaluation, name)));
        cells.push(evaluation.seconds.map_or_else(|| "–".into(), table::seconds));
        let is_best = best.is_some_and(|best| std::ptr::eq(best, evaluation));
        let remark = match (is_best, evaluation.best) {
            (true, _) => "best",
            (_, true) => "best until then",
            _ => "",
        };
        EvaluationRow { best: is_best, teacher: false, cells, remark }
    };
    let teacher = log.teacher.as_ref().map(|teacher| {
        let mut cells = vec!["teacher".to_owned(), "–".into()];
        cells.extend(
            names.iter().map(|name| teacher.metric(name).map_or_else(|| "–".into(), number)),
        );
        cells.push(teacher.seconds.map_or_else(|| "–".into(), table::seconds));
        EvaluationRow { best: false, teacher: true, cells, remark: "" }
    });
    Evaluations {
        charts: charts::of_evaluations(log),
        metrics: names.iter().map(|name| metric_words(name)).collect(),
        rows: teacher.into_iter().chain(log.evaluations.iter().map(row)).collect(),
    }
}

fn layers(log: &RunLog) -> Option<Layers> {
    let layers = log.layers();
    let rows = layers.iter().map(|layer| {
        [
            layer.layer.to_string(),
            number(layer.first_loss),
            number(layer.last_loss),
            number(layer.ratio),
        ]
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then(|| Layers { charts: vec![charts::of_layers(&layers)], rows })
}
