//! Variants of `--ablate` as shaded tables: what each change did to each task.

use serde::Serialize;

use super::results::{Difference, Interval, Results};

/// The variants of one part of one student.
#[derive(Debug, Serialize)]
pub struct Part {
    /// `student: router`.
    pub title: String,
    /// Tasks, with the unit of what is told of them.
    pub tasks: Vec<String>,
    /// Variants.
    pub rows: Vec<Row>,
}

/// One variant.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What the part was changed to.
    pub name: String,
    /// By task.
    pub cells: Vec<Cell>,
}

/// What a change did to a task.
#[derive(Debug, Serialize)]
pub struct Cell {
    /// The variant's value less the student's.
    pub text: String,
    /// Its interval.
    pub tip: String,
    /// `worse`, `better`, or nothing if the interval holds 0.
    pub class: &'static str,
    /// Depth of the shade, 0 to 1: the share of the largest change of the task.
    pub level: f64,
}

/// All parts that were changed, in their order.
pub fn parts(results: &Results) -> Vec<Part> {
    let mut groups: Vec<(String, Vec<(&str, &Difference)>)> = Vec::new();
    for difference in &results.differences {
        let Some((part, name)) = difference.ablation.as_deref().and_then(|a| a.split_once(": "))
        else {
            continue;
        };
        let title = format!("{}: {part}", difference.first);
        match groups.iter_mut().find(|(known, _)| *known == title) {
            Some((_, rows)) => rows.push((name, difference)),
            None => groups.push((title, vec![(name, difference)])),
        }
    }
    groups.into_iter().map(|(title, rows)| part(title, &rows)).collect()
}

fn part(title: String, rows: &[(&str, &Difference)]) -> Part {
    let mut tasks: Vec<&str> = Vec::new();
    for (task, _) in rows.iter().flat_map(|(_, difference)| &difference.tasks) {
        if !tasks.contains(&task.as_str()) {
            tasks.push(task);
        }
    }
    let changes = |difference: &Difference| -> Vec<Option<Change>> {
        tasks.iter().map(|task| Change::of(difference, task)).collect()
    };
    let changes: Vec<Vec<Option<Change>>> = rows.iter().map(|(_, of)| changes(of)).collect();
    let most = |task: usize| {
        let sizes = changes.iter().filter_map(|row| row[task].as_ref());
        sizes.map(|change| change.of.mean.abs()).fold(0.0, f64::max)
    };
    let most: Vec<f64> = (0..tasks.len()).map(most).collect();
    let row = |((name, _), changes): (&(&str, &Difference), &Vec<Option<Change>>)| Row {
        name: (*name).to_owned(),
        cells: changes
            .iter()
            .zip(&most)
            .map(|(change, &most)| cell(change.as_ref(), most))
            .collect(),
    };
    let unit = |(n, task): (usize, &&str)| {
        let nats = changes.iter().any(|row| row[n].as_ref().is_some_and(|change| change.nats));
        format!("{task}, {}", if nats { "nats" } else { "points" })
    };
    Part {
        title,
        tasks: tasks.iter().enumerate().map(unit).collect(),
        rows: rows.iter().zip(&changes).map(row).collect(),
    }
}

/// What a variant has more than its student.
struct Change {
    of: Interval,
    nats: bool,
}

impl Change {
    fn of(difference: &Difference, task: &str) -> Option<Self> {
        let metrics = difference.task(task);
        let known = ["acc", "score", "nll"];
        let (metric, of) =
            known.iter().find_map(|known| metrics.iter().find(|(metric, _)| metric == known))?;
        // Files say what the student has more.
        let of = Interval { mean: -of.mean, low: -of.high, high: -of.low };
        Some(Self { of, nats: metric == "nll" })
    }
}

fn cell(change: Option<&Change>, most: f64) -> Cell {
    let Some(Change { of, nats }) = change else {
        return Cell { text: "–".into(), tip: String::new(), class: "", level: 0.0 };
    };
    let shown = |value: f64| {
        if *nats { format!("{value:+.3}") } else { format!("{:+.1}", 100.0 * value) }
    };
    let sure = of.low > 0.0 || of.high < 0.0;
    let class = match (sure, (of.mean > 0.0) == *nats) {
        (false, _) => "",
        (true, true) => "worse",
        (true, false) => "better",
    };
    Cell {
        text: shown(of.mean),
        tip: format!("95 % interval {} to {}", shown(of.low), shown(of.high)),
        class,
        level: if most > 0.0 { 0.1 + 0.6 * of.mean.abs() / most } else { 0.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(mean: f64, nats: bool) -> Change {
        Change { of: Interval { mean, low: mean - 0.1, high: mean + 0.1 }, nats }
    }

    #[test]
    fn shades_say_what_the_interval_is_sure_of() {
        let class = |mean, nats| cell(Some(&change(mean, nats)), 0.5).class;
        assert_eq!([class(0.5, true), class(-0.5, true)], ["worse", "better"]);
        assert_eq!([class(0.5, false), class(-0.5, false)], ["better", "worse"]);
        assert_eq!([class(0.05, true), class(-0.05, false)], ["", ""]);
        assert_eq!(cell(None, 0.5).text, "–");
        assert_eq!(cell(Some(&change(-0.25, false)), 0.5).text, "-25.0");
        assert!((cell(Some(&change(0.5, true)), 0.5).level - 0.7).abs() < 1e-12);
    }
}
