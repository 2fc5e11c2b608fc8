//! The charts of a run.

use super::summary::metric_names;
use crate::plot::{BarChart, Group, LineChart, Mark, Scale, Series, Stroke, number};
use crate::run_log::{LayerLoss, RunLog, StageLog, Step, metric_words};

/// Steps from which on a curve is smoothed too.
const SMOOTH_FROM: usize = 40;

/// Loss, gradient norm, learning rate and, where the run noted the time, speed of a stage.
pub fn of_stage(stage: &StageLog) -> Vec<String> {
    let unit = match stage.name.as_str() {
        "transfer" => "mean squared error",
        _ => "nats per token",
    };
    let mut charts = vec![
        curve(stage, "Loss", unit, Scale::fitting(values(stage, |step| step.loss)), |step| {
            step.loss
        }),
        curve(
            stage,
            "Gradient norm",
            "before clipping",
            Scale::fitting(values(stage, |step| step.grad_norm)),
            |step| step.grad_norm,
        ),
        curve(stage, "Learning rate", "", Scale::Linear, |step| step.lr),
    ];
    if stage.seconds().is_some() {
        let speed = |step: &Step| step.tokens as f64 / step.seconds.unwrap_or(f64::NAN);
        charts.push(curve(stage, "Speed", "tokens a second", Scale::Linear, speed));
    }
    charts
}

fn values(stage: &StageLog, value: fn(&Step) -> f64) -> impl Iterator<Item = f64> {
    stage.taken().map(value)
}

/// A curve over the steps that were taken; the others are marked.
fn curve(
    stage: &StageLog,
    title: &str,
    about: &str,
    scale: Scale,
    value: impl Fn(&Step) -> f64,
) -> String {
    let points: Vec<(f64, f64)> =
        stage.taken().map(|step| (step.step as f64, value(step))).collect();
    let name = title.to_lowercase();
    let noisy = title != "Learning rate" && points.len() >= SMOOTH_FROM;
    let series = if noisy {
        // Odd: as many steps before as after.
        let window = (points.len() / 20) | 1;
        let mean = Series {
            name: format!("mean of {window} steps"),
            points: running_mean(&points, window),
            stroke: Stroke::Line,
            intervals: Vec::new(),
        };
        vec![Series { name, points, stroke: Stroke::Pale, intervals: Vec::new() }, mean]
    } else {
        vec![Series { name, points, stroke: Stroke::Line, intervals: Vec::new() }]
    };
    let marks = stage.skipped().map(|step| Mark {
        x: step.step as f64,
        label: format!("step {} was skipped: loss {}", step.step, number(step.loss)),
    });
    LineChart {
        title: title.into(),
        about: about.into(),
        x: "step".into(),
        scale,
        series,
        marks: marks.collect(),
        ..LineChart::default()
    }
    .html()
}

/// The mean of each point and its neighbors, `window` in all, wherever there are so many.
fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let window = window.max(1);
    points
        .windows(window)
        .map(|part| {
            let sum: f64 = part.iter().map(|point| point.1).sum();
            (part[window / 2].0, sum / window as f64)
        })
        .collect()
}

/// First and last transfer loss of every layer.
pub fn of_layers(layers: &[LayerLoss]) -> String {
    let values = || layers.iter().flat_map(|layer| [layer.first_loss, layer.last_loss]);
    BarChart {
        title: "Transfer loss of every layer".into(),
        about: "mean squared error".into(),
        x: "layer".into(),
        scale: Scale::fitting(values()),
        categories: layers.iter().map(|layer| layer.layer.to_string()).collect(),
        groups: vec![
            Group {
                name: "first step".into(),
                values: layers.iter().map(|layer| layer.first_loss).collect(),
                intervals: Vec::new(),
            },
            Group {
                name: "last step".into(),
                values: layers.iter().map(|layer| layer.last_loss).collect(),
                intervals: Vec::new(),
            },
        ],
        base: None,
        reference: None,
    }
    .html()
}

/// One chart for each metric, over the steps of the whole run.
pub fn of_evaluations(log: &RunLog) -> Vec<String> {
    // A stage's steps come after all steps of the stages before it.
    let before = |name: &str| -> usize {
        log.stages.iter().take_while(|stage| stage.name != name).map(StageLog::done).sum()
    };
    let place = |stage: &str, step: usize| (before(stage) + step) as f64;
    let best = log.best().map(|best| Mark {
        x: place(&best.stage, best.step),
        label: format!("best: {} step {}", best.stage, best.step),
    });
    let mut stages: Vec<&str> = Vec::new();
    for evaluation in &log.evaluations {
        if !stages.contains(&evaluation.stage.as_str()) {
            stages.push(&evaluation.stage);
        }
    }
    let charts = metric_names(&log.evaluations).into_iter().map(|name| {
        let series = stages.iter().map(|&stage| Series {
            name: stage.to_owned(),
            points: log
                .evaluations
                .iter()
                .filter(|evaluation| evaluation.stage == stage)
                .filter_map(|evaluation| {
                    Some((place(stage, evaluation.step), evaluation.metric(&name)?))
                })
                .collect(),
            stroke: Stroke::Dots,
            intervals: Vec::new(),
        });
        let series: Vec<Series> = series.filter(|series| !series.points.is_empty()).collect();
        let teacher = log.teacher.as_ref().and_then(|teacher| teacher.metric(&name));
        let values = series.iter().flat_map(|series| series.points.iter().map(|point| point.1));
        let share = name.ends_with("_recall");
        let scale = if share { Scale::Linear } else { Scale::fitting(values.chain(teacher)) };
        LineChart {
            title: capitalised(&metric_words(&name)),
            about: if name.ends_with("_nll") { "nats per token".into() } else { String::new() },
            x: "step of the run".into(),
            scale,
            series,
            marks: best.iter().cloned().collect(),
            reference: teacher.map(|value| ("teacher".into(), value)),
            ends: if share { vec![0.0, 1.0] } else { Vec::new() },
            ..LineChart::default()
        }
        .html()
    });
    charts.collect()
}

/// With a capital, as the titles of charts have.
fn capitalised(words: &str) -> String {
    let mut rest = words.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_may_begin_with_anything() {
        assert_eq!(capitalised("held-out loss"), "Held-out loss");
        assert_eq!(capitalised("été"), "Été");
        assert_eq!(capitalised(""), "");
    }

    #[test]
    fn the_mean_stands_in_the_middle() {
        let points: Vec<(f64, f64)> = (1..=4).map(|n| (f64::from(n), f64::from(n * n))).collect();
        assert_eq!(running_mean(&points, 3), [(2.0, 14.0 / 3.0), (3.0, 29.0 / 3.0)]);
        assert!(running_mean(&points, 5).is_empty());
    }
}
