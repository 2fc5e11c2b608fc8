//! The charts of results.

use still_eval::BenchPoint;

use super::results::{Results, Subject, TaskResult};
use crate::plot::{BarChart, Dot, Group, LineChart, Scale, Scatter, Series, Stroke};

/// Tasks that stand side by side in one chart, so that their names have room.
const SIDE_BY_SIDE: usize = 4;
/// The color of dots that are variants: grey.
const VARIANT: usize = 5;
const MIB: f64 = (1 << 20) as f64;

/// Tasks of one kind at several lengths: its name, and the lengths with their tasks, ascending.
struct Family<'a> {
    name: String,
    lengths: Vec<(usize, &'a str)>,
}

/// Tasks that were asked at a length, put together by what they are without it.
fn families(results: &Results) -> Vec<Family<'_>> {
    let mut families: Vec<Family<'_>> = Vec::new();
    for (task, _) in results.tasks() {
        // Results of older versions have no lengths: of models that are asked the same, one that has is enough.
        let length = results.subjects.iter().find_map(|subject| subject.task(task)?.length);
        let Some(length) = length else { continue };
        let name = task.replacen(&format!("_{length}"), "", 1);
        match families.iter_mut().find(|family| family.name == name) {
            Some(family) => family.lengths.push((length, task)),
            None => families.push(Family { name, lengths: vec![(length, task)] }),
        }
    }
    families.iter_mut().for_each(|family| family.lengths.sort_unstable());
    families
}

/// A metric as charts show it: shares in per cent.
fn unit(metric: &str) -> (f64, String) {
    match metric {
        "perplexity" => (1.0, "perplexity, less is better".into()),
        _ => (100.0, format!("{metric}, %")),
    }
}

/// Of a chart of these values: shares lie between 0 and 100, perplexities may differ by orders of magnitude.
fn scale_of(metric: &str, values: impl IntoIterator<Item = f64>) -> Scale {
    if metric == "perplexity" { Scale::fitting(values) } else { Scale::Linear }
}

fn scaled(value: Option<[f64; 2]>, scale: f64) -> Option<[f64; 2]> {
    value.map(|ends| ends.map(|end| scale * end))
}

/// Each task's first metric against the bytes of the cache, of tasks with several lengths the longest.
pub fn against_bytes(results: &Results) -> Vec<String> {
    let shorter: Vec<&str> = families(results)
        .iter()
        .flat_map(|family| &family.lengths[..family.lengths.len() - 1])
        .map(|(_, task)| *task)
        .collect();
    let scatter = |(task, any): (&str, &TaskResult)| {
        let metric = any.first()?.metric;
        let (scale, about) = unit(metric);
        let dot = |(n, subject): (usize, &Subject)| {
            let result = subject.task(task)?;
            let value = result.first()?;
            Some(Dot {
                name: subject.label(),
                named: subject.ablation.is_none(),
                color: if subject.ablation.is_none() { n } else { VARIANT },
                x: result.cache_bytes? / MIB,
                y: scale * value.value,
                interval: scaled(value.interval, scale).filter(|_| subject.ablation.is_none()),
            })
        };
        let dots: Vec<Dot> = results.subjects.iter().enumerate().filter_map(dot).collect();
        if dots.is_empty() {
            return None;
        }
        let chance = any.chance.filter(|_| metric != "perplexity");
        let chart = Scatter {
            title: task.into(),
            about,
            x: "cache, MiB".into(),
            scale: scale_of(metric, dots.iter().flat_map(Dot::ys)),
            x_scale: Scale::fitting(dots.iter().map(|dot| dot.x)),
            dots,
            reference: chance.map(|chance| ("chance".into(), scale * chance)),
        };
        Some(chart.html())
    };
    let longest = results.tasks().into_iter().filter(|(task, _)| !shorter.contains(task));
    longest.filter_map(scatter).collect()
}

/// Bars of every task that is not drawn as a curve over lengths: of shares in groups that fit side by side, of perplexities, which
/// have no common scale, one chart each.
pub fn bars(results: &Results) -> Vec<String> {
    let curves = families(results);
    let drawn = |task: &str| {
        let mut several = curves.iter().filter(|family| family.lengths.len() > 1);
        several.any(|family| family.lengths.iter().any(|(_, name)| *name == task))
    };
    let left: Vec<(&str, &TaskResult)> =
        results.tasks().into_iter().filter(|(task, _)| !drawn(task)).collect();
    let mut metrics: Vec<&str> = Vec::new();
    for value in left.iter().flat_map(|(_, any)| any.values()) {
        if !metrics.contains(&value.metric) && value.metric != "acc_bytes" {
            metrics.push(value.metric);
        }
    }
    let mut charts = Vec::new();
    for metric in metrics {
        let has = |any: &TaskResult| any.values().iter().any(|value| value.metric == metric);
        let tasks: Vec<(&str, &TaskResult)> =
            left.iter().filter(|(_, any)| has(any)).copied().collect();
        let together = if metric == "perplexity" { 1 } else { SIDE_BY_SIDE };
        for tasks in tasks.chunks(together) {
            charts.push(bar_chart(results, metric, tasks));
        }
    }
    charts
}

fn bar_chart(results: &Results, metric: &str, tasks: &[(&str, &TaskResult)]) -> String {
    let (scale, title, about) = match (metric, tasks) {
        ("perplexity", [(task, _)]) => (1.0, *task, "perplexity, less is better"),
        _ => (100.0, metric, "%"),
    };
    let group = |model: &Subject| {
        let values = tasks.iter().map(|(task, _)| {
            let values = model.task(task).map(TaskResult::values).unwrap_or_default();
            values.into_iter().find(|value| value.metric == metric)
        });
        let values: Vec<_> = values.collect();
        let value = |value: &Option<super::results::Value>| {
            value.map_or(f64::NAN, |value| scale * value.value)
        };
        Group {
            name: model.label(),
            values: values.iter().map(value).collect(),
            intervals: values
                .iter()
                .map(|value| scaled(value.and_then(|v| v.interval), scale))
                .collect(),
        }
    };
    let chances = tasks.iter().map(|(_, any)| any.chance.map_or(f64::NAN, |chance| scale * chance));
    let groups: Vec<Group> = results.models().map(group).collect();
    let values = groups.iter().flat_map(|group| {
        group.values.iter().chain(group.intervals.iter().flatten().flatten()).copied()
    });
    BarChart {
        title: title.into(),
        about: about.into(),
        x: "task".into(),
        scale: scale_of(metric, values),
        // A perplexity of 1 is certainty: the height above it is the loss in nats.
        base: Some(1.0),
        categories: tasks.iter().map(|(task, _)| (*task).to_owned()).collect(),
        groups,
        reference: (metric != "perplexity").then(|| ("chance".into(), chances.collect())),
    }
    .html()
}

/// Curves over lengths of every task with several, and over positions of the longest windows.
pub fn lengths(results: &Results) -> Vec<String> {
    let mut charts = Vec::new();
    for family in families(results) {
        let Some(&(_, longest)) = family.lengths.last() else { continue };
        if family.lengths.len() > 1 {
            charts.push(over_lengths(results, &family));
        }
        charts.extend(over_positions(results, longest));
    }
    charts
}

fn over_lengths(results: &Results, family: &Family<'_>) -> String {
    let values = |model: &Subject, task: &str| model.task(task).and_then(TaskResult::first);
    let any = results.models().find_map(|model| values(model, family.lengths[0].1));
    let metric = any.map_or("score", |value| value.metric);
    let (scale, about) = unit(metric);
    let series = results.models().map(|model| {
        let (points, intervals) = family
            .lengths
            .iter()
            .filter_map(|&(length, task)| {
                let value = values(model, task)?;
                let point = (length as f64, scale * value.value);
                Some((point, scaled(value.interval, scale)))
            })
            .unzip();
        Series { name: model.label(), points, stroke: Stroke::Dots, intervals }
    });
    let series: Vec<Series> = series.collect();
    LineChart {
        title: family.name.clone(),
        about,
        x: "tokens".into(),
        scale: scale_of(metric, series.iter().flat_map(Series::ys)),
        x_scale: Scale::Log,
        series,
        ..LineChart::default()
    }
    .html()
}

fn over_positions(results: &Results, task: &str) -> Option<String> {
    let series = results.models().map(|model| {
        let curve = model.task(task).map(|result| result.curve.as_slice()).unwrap_or_default();
        let points = curve.iter().map(|point| ((point.from + point.to) as f64 / 2.0, point.nll));
        let (name, points) = (model.label(), points.collect());
        Series { name, points, stroke: Stroke::Line, intervals: Vec::new() }
    });
    let series: Vec<Series> = series.collect();
    if series.iter().all(|series| series.points.is_empty()) {
        return None;
    }
    let chart = LineChart {
        title: format!("{task} by position"),
        about: "nats a token".into(),
        x: "position in the window".into(),
        series,
        ..LineChart::default()
    };
    Some(chart.html())
}

/// Prefill, decode and cache bytes by length.
pub fn efficiency(results: &Results) -> Vec<String> {
    let chart = |title: &str, about: &str, scale: Scale, value: fn(&BenchPoint) -> f64| {
        let series = results.models().map(|model| {
            let points = model.efficiency.iter().flat_map(|efficiency| &efficiency.points);
            let mut points: Vec<(f64, f64)> =
                points.map(|point| (point.context as f64, value(point))).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let name = model.label();
            Series { name, points, stroke: Stroke::Dots, intervals: Vec::new() }
        });
        LineChart {
            title: title.into(),
            about: about.into(),
            x: "tokens".into(),
            scale,
            x_scale: Scale::Log,
            series: series.collect(),
            ..LineChart::default()
        }
        .html()
    };
    if results.models().all(|model| model.efficiency.is_none()) {
        return Vec::new();
    }
    let bytes = |point: &BenchPoint| point.cache_bytes as f64 / MIB;
    let points = results.models().filter_map(|model| model.efficiency.as_ref());
    let scale = Scale::fitting(points.flat_map(|found| &found.points).map(bytes));
    vec![
        chart("Cache", "MiB", scale, bytes),
        chart("Prefill", "tokens a second", Scale::Linear, |point| point.prefill_tokens_per_s),
        chart("Decode", "tokens a second", Scale::Linear, |point| point.decode_tokens_per_s),
    ]
}
