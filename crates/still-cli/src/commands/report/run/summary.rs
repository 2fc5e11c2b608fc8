//! The figures of a run, for a terminal or a script.

use std::path::Path;

use serde::Serialize;

use crate::commands::linearize::layer_table;
use crate::plot::number;
use crate::provenance::Provenance;
use crate::run_log::{Evaluation, LayerLoss, RunLog, TeacherEvaluation, metric_words};
use crate::table;
use crate::verdict::Verdict;

/// What `still report run` prints.
#[derive(Debug, Serialize)]
pub struct Summary {
    run_dir: String,
    report: String,
    stages: Vec<Stage>,
    layers: Vec<LayerLoss>,
    evaluations: Vec<Evaluation>,
    teacher: Option<TeacherEvaluation>,
    starts: Vec<Provenance>,
    verdict: Option<Verdict>,
}

/// A stage so far.
#[derive(Debug, Serialize)]
pub struct Stage {
    /// `"transfer"`, `"finetune"`.
    pub stage: String,
    /// Steps done.
    pub steps: usize,
    /// Steps that the recipe asks for.
    pub planned: Option<usize>,
    /// Tokens read.
    pub tokens: usize,
    /// Steps that were left out as spikes.
    pub skipped: usize,
    /// Of the first step that was taken.
    pub first_loss: Option<f64>,
    /// Of the last one.
    pub last_loss: Option<f64>,
    /// Wall-clock seconds, where the run noted them.
    pub seconds: Option<f64>,
}

/// Every stage of a run.
pub fn stages(log: &RunLog) -> Vec<Stage> {
    let planned = |name: &str| {
        let (_, recipe) = log.recipe.as_ref()?;
        usize::try_from(recipe.get(name)?.get("steps")?.as_integer()?).ok()
    };
    log.stages
        .iter()
        .map(|stage| Stage {
            stage: stage.name.clone(),
            steps: stage.done(),
            planned: planned(&stage.name),
            tokens: stage.tokens(),
            skipped: stage.skipped().count(),
            first_loss: stage.taken().next().map(|step| step.loss),
            last_loss: stage.taken().next_back().map(|step| step.loss),
            seconds: stage.seconds(),
        })
        .collect()
}

impl Summary {
    /// Condenses a run.
    pub fn new(log: &RunLog, report: &Path) -> Self {
        Self {
            run_dir: log.dir.display().to_string(),
            report: report.display().to_string(),
            stages: stages(log),
            layers: log.layers(),
            evaluations: log.evaluations.clone(),
            teacher: log.teacher.clone(),
            starts: log.starts.clone(),
            verdict: log.verdict.clone(),
        }
    }

    /// As tables.
    pub fn render(&self) -> String {
        let loss = |loss: Option<f64>| loss.map_or_else(|| "–".into(), number);
        let rows = self.stages.iter().map(|stage| {
            vec![
                stage.stage.clone(),
                steps_words(stage),
                table::count(stage.tokens),
                stage.skipped.to_string(),
                loss(stage.first_loss),
                loss(stage.last_loss),
            ]
        });
        let headers = ["stage", "steps", "tokens", "skipped", "first loss", "last loss"];
        let mut tables: Vec<String> = self.verdict.iter().map(Verdict::render).collect();
        tables.push(table::render(&headers, &rows.collect::<Vec<_>>()));
        if !self.evaluations.is_empty() {
            tables.push(self.evaluation_table());
        }
        if !self.layers.is_empty() {
            tables.push(layer_table(&self.layers));
        }
        tables.join("\n\n")
    }

    fn evaluation_table(&self) -> String {
        let names = metric_names(&self.evaluations);
        let words: Vec<String> = names.iter().map(|name| metric_words(name)).collect();
        let mut headers = vec!["evaluation", "step"];
        headers.extend(words.iter().map(String::as_str));
        headers.push("");
        let teacher = self.teacher.iter().map(|teacher| {
            let mut row = vec!["teacher".to_owned(), "–".into()];
            let value = |name: &String| teacher.metric(name).map_or_else(|| "–".into(), number);
            row.extend(names.iter().map(value));
            row.push(String::new());
            row
        });
        let rows = self.evaluations.iter().map(|evaluation| {
            let mut row = vec![evaluation.stage.clone(), evaluation.step.to_string()];
            row.extend(names.iter().map(|name| metric(evaluation, name)));
            row.push(if evaluation.best { "best so far" } else { "" }.into());
            row
        });
        table::render(&headers, &teacher.chain(rows).collect::<Vec<_>>())
    }
}

/// `40 of 200`
pub fn steps_words(stage: &Stage) -> String {
    match stage.planned {
        Some(planned) if planned != stage.steps => format!("{} of {planned}", stage.steps),
        _ => stage.steps.to_string(),
    }
}

/// Every metric that any evaluation has, in the order they appear.
pub fn metric_names(evaluations: &[Evaluation]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (name, _) in evaluations.iter().flat_map(Evaluation::metrics) {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// A metric as text; a dash where it was not measured.
pub fn metric(evaluation: &Evaluation, name: &str) -> String {
    evaluation.metric(name).map_or_else(|| "–".into(), number)
}
