//! The comparison of each student with its teacher in sentences, at the top of the page.

use serde::Serialize;
use still_eval::Interval;

use super::results::{Results, Subject, TaskResult};
use crate::table::{self, WIDTH};
use crate::verdict::{Quality, Recall, Row, cost};
use crate::wrap::wrapped;

/// A task on which a student's accuracy is lower by more points than this makes it unusable.
const MOST_POINTS_LOST: f64 = 10.0;

/// What results say of one student.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Its name.
    pub student: String,
    /// Its teacher's.
    pub teacher: String,
    /// Quality and cost, then accuracy, then what they are of.
    pub sentences: Vec<String>,
}

impl Verdict {
    /// For a terminal.
    pub fn text(&self) -> String {
        let Self { student, teacher, sentences } = self;
        wrapped(&format!("{student} compared with {teacher}. {}", sentences.join(" ")), WIDTH)
    }
}

/// A verdict on every student that was asked what its teacher was; none where the files do not say which is which.
pub fn all(results: &Results) -> Vec<Verdict> {
    let Some(teacher) = results.teacher() else { return Vec::new() };
    let students = results.models().filter(|model| model.is_student());
    students.filter_map(|student| of(results, teacher, student)).collect()
}

fn of(results: &Results, teacher: &Subject, student: &Subject) -> Option<Verdict> {
    let costs = Cost::of(teacher, student);
    let [had, has] = [teacher, student].map(|model| row(results, teacher, model, &costs));
    let accuracies = Accuracies::of(results, teacher, student);
    let mut sentences = match Quality::of(&had, &has) {
        Quality::Unknown if accuracies.0.is_empty() => return None,
        Quality::Unknown => {
            std::iter::once(accuracies.headline()).chain(cost(&had, &has)).collect()
        }
        quality => vec![quality.max(accuracies.best_quality()).sentence(&had, &has)],
    };
    sentences.extend(accuracies.sentence());
    sentences.extend(costs.map(|cost| cost.place));
    let [student, teacher] = [student, teacher].map(|model| model.name.clone());
    Some(Verdict { student, teacher, sentences })
}

/// Perplexity of the longest windows that both were asked, answers found in long prompts, and cost.
fn row(results: &Results, teacher: &Subject, model: &Subject, costs: &Option<Cost>) -> Row {
    let windows = results.tasks().into_iter();
    let windows = windows.filter(|(task, _)| task.starts_with("perplexity"));
    let ratios = windows.filter_map(|(task, any)| {
        Some((any.length, results.difference(model, teacher, task, "nll")?))
    });
    let ratio = ratios.max_by_key(|(length, _)| *length).map(|(_, ratio)| ratio);
    let of_model = |costs: &Cost| {
        if std::ptr::eq(model, teacher) { costs.teacher } else { costs.student }
    };
    let cost = costs.as_ref().map(of_model).unwrap_or_default();
    Row {
        perplexity_ratio: ratio.map(|Interval { mean, low, high }| Interval {
            mean: mean.exp(),
            low: low.exp(),
            high: high.exp(),
        }),
        recall: found(results, model).into_iter().collect(),
        cache_bytes: cost.0,
        decode_tokens_per_s: cost.1,
        ..Row::named(&model.name)
    }
}

/// Right answers to all questions about long prompts.
fn found(results: &Results, model: &Subject) -> Option<Recall> {
    let asked = results.tasks().into_iter().filter(|(_, any)| first(any) == "score");
    let asked = asked.filter_map(|(task, _)| model.task(task));
    let (mut right, mut of, mut length) = (0.0, 0, 0);
    for task in asked {
        right += task.first().map_or(0.0, |value| value.value) * task.n as f64;
        of += task.n;
        length = length.max(task.length.unwrap_or(0));
    }
    let what = "answers in long prompts".into();
    (of > 0).then(|| Recall { what, right: right.round() as usize, of, length })
}

fn first(task: &TaskResult) -> &'static str {
    task.first().map_or("", |value| value.metric)
}

/// Cache bytes and decoded tokens a second of teacher and student at one context.
#[derive(Clone, Debug, Default)]
struct Cost {
    teacher: (Option<usize>, Option<f64>),
    student: (Option<usize>, Option<f64>),
    /// Where they are from.
    place: String,
}

impl Cost {
    /// At the longest context that both were timed at, or else of the longest task that both were asked.
    fn of(teacher: &Subject, student: &Subject) -> Option<Self> {
        if let (Some(dense), Some(own)) = (&teacher.efficiency, &student.efficiency) {
            let pairs = dense.points.iter().filter_map(|dense| {
                Some((dense, own.points.iter().find(|own| own.context == dense.context)?))
            });
            let (dense, own) = pairs.max_by_key(|(dense, _)| dense.context)?;
            return Some(Self {
                teacher: (Some(dense.cache_bytes), Some(dense.decode_tokens_per_s)),
                student: (Some(own.cache_bytes), Some(own.decode_tokens_per_s)),
                place: format!("Cache and speed at {} tokens.", table::count(dense.context)),
            });
        }
        let tasks = teacher.tasks.iter().filter_map(|(name, dense)| {
            Some((dense.length?, name, dense.cache_bytes?, student.task(name)?.cache_bytes?))
        });
        let (_, name, dense, own) = tasks.max_by_key(|(length, ..)| *length)?;
        let bytes = |bytes: f64| (Some(bytes.round() as usize), None);
        let place = format!("Cache: mean over the items of {name}.");
        Some(Self { teacher: bytes(dense), student: bytes(own), place })
    }
}

/// Differences of a student's accuracy from its teacher's, in points, with the items asked.
struct Accuracies(Vec<(String, Interval, usize)>);

impl Accuracies {
    fn of(results: &Results, teacher: &Subject, student: &Subject) -> Self {
        let difference = |(task, any): (&str, &TaskResult)| {
            let metric = any.first()?.metric;
            let asked = metric.starts_with("acc").then(|| student.task(task))??;
            let Interval { mean, low, high } =
                results.difference(student, teacher, task, metric)?;
            let points = Interval { mean: 100.0 * mean, low: 100.0 * low, high: 100.0 * high };
            Some((task.to_owned(), points, asked.n))
        };
        Self(results.tasks().into_iter().filter_map(difference).collect())
    }

    /// Tasks whose interval lies below 0.
    fn lower(&self) -> impl Iterator<Item = &(String, Interval, usize)> {
        self.0.iter().filter(|(_, points, _)| points.high < 0.0)
    }

    /// The best word that these differences allow.
    fn best_quality(&self) -> Quality {
        let most = self.lower().map(|(_, points, _)| -points.mean).fold(0.0, f64::max);
        match self.lower().next() {
            None => Quality::AsGood,
            Some(_) if most <= MOST_POINTS_LOST => Quality::Usable,
            Some(_) => Quality::NotYet,
        }
    }

    /// The verdict where there is nothing but accuracy.
    fn headline(&self) -> String {
        match self.lower().count() {
            0 => "No task tells the student from its teacher.".into(),
            lower => format!("Worse than its teacher on {lower} of {}.", tasks(self.0.len())),
        }
    }

    fn sentence(&self) -> Option<String> {
        let items = self.0.iter().map(|(.., items)| *items);
        let (least, most) = (items.clone().min()?, items.max()?);
        let items = match least == most {
            true => format!("{most} items"),
            false => format!("{least} to {most} items"),
        };
        let lower: Vec<String> = self
            .lower()
            .map(|(task, Interval { mean, low, high }, _)| {
                format!("{task} {mean:+.1} points (95 %: {low:+.1} to {high:+.1})")
            })
            .collect();
        let of = tasks(self.0.len());
        Some(match lower.as_slice() {
            [] => format!(
                "Accuracy on {of} of {items}: no 95 % interval of the difference lies below 0."
            ),
            lower => format!("Accuracy on {of} of {items}: lower on {}.", lower.join(", ")),
        })
    }
}

fn tasks(count: usize) -> String {
    if count == 1 { "1 task".into() } else { format!("{count} tasks") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accuracies(points: &[(f64, f64, f64)]) -> Accuracies {
        let task = |(n, &(mean, low, high)): (usize, &(f64, f64, f64))| {
            (format!("task{n}"), Interval { mean, low, high }, 200)
        };
        Accuracies(points.iter().enumerate().map(task).collect())
    }

    #[test]
    fn accuracy_counts_where_its_interval_lies_below_0() {
        let same = accuracies(&[(-3.0, -7.0, 1.0), (2.0, 0.5, 3.0)]);
        assert_eq!(same.best_quality(), Quality::AsGood);
        assert_eq!(same.headline(), "No task tells the student from its teacher.");
        assert!(same.sentence().unwrap().contains("2 tasks of 200 items"));
        let lower = accuracies(&[(-3.0, -7.0, 1.0), (-5.0, -9.0, -1.0)]);
        assert_eq!(lower.best_quality(), Quality::Usable);
        assert_eq!(lower.headline(), "Worse than its teacher on 1 of 2 tasks.");
        assert_eq!(
            lower.sentence().unwrap(),
            "Accuracy on 2 tasks of 200 items: lower on task1 -5.0 points (95 %: -9.0 to -1.0)."
        );
        assert_eq!(accuracies(&[(-20.0, -29.0, -11.0)]).best_quality(), Quality::NotYet);
        assert_eq!(accuracies(&[]).sentence(), None);
    }
}
