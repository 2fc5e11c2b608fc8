//! Variants of `--ablate` as shaded tables: the effect of each change on each task.

use serde::Serialize;
use still_eval::{Interval, Skipped, THE_STUDENT};

use super::results::{Difference, LeftOut, Results};

/// A shaded table. Of parts that were changed one at a time, or three and more together: a row for every variant, a column for
/// every task. Of two that were changed together: a table for every task, the first part's settings down, the second's across.
#[derive(Debug, Serialize)]
pub struct Part {
    /// `student: router`.
    pub title: String,
    /// What the columns are, with their unit where they differ in it.
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
}

/// One variant, or one setting.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub cells: Vec<Cell>,
}

/// What a change did to a task.
#[derive(Debug, Serialize)]
pub struct Cell {
    /// The variant's value less the student's.
    pub text: String,
    /// Its interval, or why there is none.
    pub tip: String,
    /// `worse`, `better`, or nothing if the interval holds 0.
    pub class: &'static str,
    /// Depth of the shade, 0 to 1: the share of the largest change of the task.
    pub level: f64,
}

/// All parts that were changed, in their order.
pub fn parts(results: &Results) -> Vec<Part> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let variants = results.differences.iter().filter_map(|difference| {
        Some((&difference.first, difference.ablation.as_deref()?, Outcome::Change(difference)))
    });
    let skipped = results
        .skipped
        .iter()
        .map(|left_out| (&left_out.first, left_out.ablation.as_str(), Outcome::LeftOut(left_out)));
    for (student, ablation, outcome) in variants.chain(skipped) {
        let settings: Option<Vec<(&str, &str)>> =
            ablation.split(", ").map(|one| one.split_once(": ")).collect();
        let Some(settings) = settings else { continue };
        let (factors, settings): (Vec<&str>, Vec<&str>) = settings.into_iter().unzip();
        let found =
            groups.iter_mut().find(|group| group.student == student && group.factors == factors);
        let combination = Combination { name: ablation, settings, outcome };
        match found {
            Some(group) => group.combinations.push(combination),
            None => groups.push(Group { student, factors, combinations: vec![combination] }),
        }
    }
    groups
        .iter()
        .flat_map(|group| match group.factors.len() {
            2 => group.crossed(),
            _ => group.listed().into_iter().collect(),
        })
        .collect()
}

/// The combinations of some parts of one student.
struct Group<'a> {
    student: &'a str,
    factors: Vec<&'a str>,
    combinations: Vec<Combination<'a>>,
}

struct Combination<'a> {
    name: &'a str,
    /// Of each factor.
    settings: Vec<&'a str>,
    outcome: Outcome<'a>,
}

#[derive(Clone, Copy)]
enum Outcome<'a> {
    Change(&'a Difference),
    LeftOut(&'a LeftOut),
}

impl<'a> Group<'a> {
    /// Tasks that any combination was asked.
    fn tasks(&self) -> Vec<&'a str> {
        let mut tasks: Vec<&str> = Vec::new();
        for (task, _) in self.asked().flat_map(|(_, difference)| &difference.tasks) {
            if !tasks.contains(&task.as_str()) {
                tasks.push(task);
            }
        }
        tasks
    }

    fn asked(&self) -> impl Iterator<Item = (&Combination<'a>, &'a Difference)> {
        self.combinations.iter().filter_map(|combination| match combination.outcome {
            Outcome::Change(difference) => Some((combination, difference)),
            Outcome::LeftOut(_) => None,
        })
    }

    /// All changes of a task: their largest size, and whether they are nats.
    fn most(&self, task: &str) -> (f64, bool) {
        let changes = self.asked().filter_map(|(_, difference)| Change::of(difference, task));
        changes
            .fold((0.0, false), |(most, _), change| (change.of.mean.abs().max(most), change.nats))
    }

    /// A row for every variant that was asked; none without any.
    fn listed(&self) -> Option<Part> {
        let tasks = self.tasks();
        let most: Vec<(f64, bool)> = tasks.iter().map(|task| self.most(task)).collect();
        let row = |(combination, difference): (&Combination<'_>, &Difference)| {
            let cells = tasks.iter().zip(&most);
            let cells = cells.map(|(task, (most, _))| cell(Change::of(difference, task), *most));
            Row { name: combination.settings.join(", "), cells: cells.collect() }
        };
        let rows: Vec<Row> = self.asked().map(row).collect();
        (!rows.is_empty()).then(|| Part {
            title: format!("{}: {}", self.student, self.factors.join(" × ")),
            columns: tasks
                .iter()
                .zip(&most)
                .map(|(task, (_, nats))| format!("{task}, {}", unit(*nats)))
                .collect(),
            rows,
        })
    }

    /// Of two factors: a table of their settings for every task.
    fn crossed(&self) -> Vec<Part> {
        let settings = |factor: usize| {
            let mut settings: Vec<&str> = Vec::new();
            for combination in &self.combinations {
                if !settings.contains(&combination.settings[factor]) {
                    settings.push(combination.settings[factor]);
                }
            }
            settings.sort_by_cached_key(|setting| natural(setting));
            settings
        };
        let (down, across) = (settings(0), settings(1));
        let table = |task: &str| {
            let (most, nats) = self.most(task);
            let row = |&first: &&str| Row {
                name: first.to_owned(),
                cells: across
                    .iter()
                    .map(|second| self.crossing([first, second], task, most))
                    .collect(),
            };
            Part {
                title: format!(
                    "{}, {task}, {}: {} ↓ {} →",
                    self.student,
                    unit(nats),
                    self.factors[0],
                    self.factors[1]
                ),
                columns: across.iter().map(|&name| name.to_owned()).collect(),
                rows: down.iter().map(row).collect(),
            }
        };
        self.tasks().into_iter().map(table).collect()
    }

    /// What one combination did to a task.
    fn crossing(&self, settings: [&str; 2], task: &str, most: f64) -> Cell {
        let empty =
            |text: &str, tip: String| Cell { text: text.into(), tip, class: "", level: 0.0 };
        let Some(combination) = self.combinations.iter().find(|known| known.settings == settings)
        else {
            return cell(None, most);
        };
        match combination.outcome {
            Outcome::Change(difference) => cell(Change::of(difference, task), most),
            Outcome::LeftOut(LeftOut { why: Skipped::SameAs(name), .. }) if name == THE_STUDENT => {
                empty("student", THE_STUDENT.into())
            }
            Outcome::LeftOut(LeftOut { why: why @ Skipped::SameAs(name), .. }) => {
                let same = self.asked().find(|(other, _)| other.name == name);
                let Some((_, difference)) = same else { return empty("–", why.to_string()) };
                let same = cell(Change::of(difference, task), most);
                Cell { tip: format!("{why}\n{}", same.tip), ..same }
            }
            Outcome::LeftOut(LeftOut { why, .. }) => empty("–", why.to_string()),
        }
    }
}

/// Numbers by size, after them words as they stand.
fn natural(setting: &str) -> (usize, String) {
    let number = setting.split(' ').next().and_then(|number| number.parse().ok());
    number.map_or((usize::MAX, String::new()), |number: usize| (number, setting.to_owned()))
}

fn unit(nats: bool) -> &'static str {
    if nats { "nats" } else { "points" }
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
        // From 0, so that none is not shown as "-0".
        let of = Interval { mean: 0.0 - of.mean, low: 0.0 - of.high, high: 0.0 - of.low };
        Some(Self { of, nats: metric == "nll" })
    }
}

fn cell(change: Option<Change>, most: f64) -> Cell {
    let Some(Change { of, nats }) = change else {
        return Cell { text: "–".into(), tip: String::new(), class: "", level: 0.0 };
    };
    let shown = |value: f64| {
        if nats { format!("{value:+.3}") } else { format!("{:+.1}", 100.0 * value) }
    };
    let sure = of.low > 0.0 || of.high < 0.0;
    let class = match (sure, (of.mean > 0.0) == nats) {
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

    fn change(mean: f64, nats: bool) -> Option<Change> {
        Some(Change { of: Interval { mean, low: mean - 0.1, high: mean + 0.1 }, nats })
    }

    #[test]
    fn shades_say_what_the_interval_is_sure_of() {
        let class = |mean, nats| cell(change(mean, nats), 0.5).class;
        assert_eq!([class(0.5, true), class(-0.5, true)], ["worse", "better"]);
        assert_eq!([class(0.5, false), class(-0.5, false)], ["better", "worse"]);
        assert_eq!([class(0.05, true), class(-0.05, false)], ["", ""]);
        assert_eq!(cell(None, 0.5).text, "–");
        assert_eq!(cell(change(-0.25, false), 0.5).text, "-25.0");
        assert!((cell(change(0.5, true), 0.5).level - 0.7).abs() < 1e-12);
    }

    #[test]
    fn settings_stand_in_the_order_of_their_size() {
        let mut settings = ["by head", "16 of 64", "8 of 64", "random", "none"];
        settings.sort_by_cached_key(|setting| natural(setting));
        assert_eq!(settings, ["8 of 64", "16 of 64", "by head", "random", "none"]);
    }
}
