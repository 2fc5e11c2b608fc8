//! Reads and merges results of `still eval --out`.
//!
//! Files are read by what they say, so that those of older versions, which say less, can be read too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use still_eval::run::CurvePoint;
use still_eval::{BenchPoint, Interval, Skipped};

use crate::commands::short_name;
use crate::errors::user;
use crate::provenance::Provenance;

/// Everything that the files say.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Every model once, then every variant of `--ablate`.
    pub subjects: Vec<Subject>,
    /// What a file's first model has more than its others.
    #[serde(skip)]
    pub differences: Vec<Difference>,
    /// Combinations of `--ablate` that were not asked.
    #[serde(skip)]
    pub skipped: Vec<LeftOut>,
    /// How caches stored exact rows, and seeds: each once.
    #[serde(skip)]
    pub settings: Vec<(&'static str, Vec<String>)>,
    /// What made each file; none of files of older versions.
    #[serde(skip)]
    pub made: Vec<Provenance>,
}

/// A model, or a variant of one.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// The last part of its path, or all of it where that would name two.
    pub name: String,
    /// As it was given.
    pub model: String,
    /// Student or teacher; unknown of other models, and of files of older versions.
    pub role: Option<Role>,
    /// The base that it is of, as its file names it.
    #[serde(skip)]
    base: Option<String>,
    /// What was changed, of a variant.
    pub ablation: Option<String>,
    /// In the order they were asked.
    pub tasks: Vec<(String, TaskResult)>,
    /// Of `--efficiency`.
    pub efficiency: Option<Efficiency>,
}

/// What a model is to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Student,
    /// The base of the students: with softmax attention.
    Teacher,
}

/// A task's result.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct TaskResult {
    acc: Option<f64>,
    acc_norm: Option<f64>,
    acc_bytes: Option<f64>,
    score: Option<f64>,
    perplexity: Option<f64>,
    #[serde(default)]
    intervals: BTreeMap<String, [f64; 2]>,
    /// Items.
    pub n: usize,
    /// What guessing reaches.
    pub chance: Option<f64>,
    /// Tokens of its windows or prompts, if it is made to a length.
    pub length: Option<usize>,
    /// Mean over items.
    pub cache_bytes: Option<f64>,
    /// Loss by position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<CurvePoint>,
}

/// A value that a task is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Value {
    /// `acc`, `score`, `perplexity`, …
    pub metric: &'static str,
    pub value: f64,
    /// Ends of its 95 % interval.
    pub interval: Option<[f64; 2]>,
}

/// What a cache takes and how fast a model is.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Efficiency {
    /// By length.
    pub points: Vec<BenchPoint>,
    /// What the cache takes whatever was read.
    pub fixed_bytes: Option<f64>,
    /// What it takes for each token.
    pub bytes_per_token: Option<f64>,
    /// That it was measured with.
    pub threads: usize,
}

/// What `first` has more than `other`.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Names.
    pub first: String,
    pub other: String,
    /// Of a variant of the first.
    pub ablation: Option<String>,
    /// By task, then by metric (`nll` for perplexity).
    pub tasks: Vec<(String, Vec<(String, Interval)>)>,
}

/// A combination of a student's `--ablate` that was not asked, and why.
#[derive(Clone, Debug)]
pub struct LeftOut {
    /// The student's name.
    pub first: String,
    pub ablation: String,
    pub why: Skipped,
}

#[derive(Deserialize)]
struct File {
    #[serde(flatten)]
    first: FileModel,
    #[serde(default)]
    compare: Vec<Compared>,
    #[serde(default)]
    skipped: Vec<FileSkipped>,
    cache_dtype: Option<String>,
    seed: Option<u64>,
    provenance: Option<Provenance>,
}

#[derive(Deserialize)]
struct FileSkipped {
    ablation: String,
    #[serde(flatten)]
    why: Skipped,
}

#[derive(Deserialize)]
struct FileModel {
    model: String,
    student: Option<bool>,
    base: Option<String>,
    tasks: serde_json::Map<String, serde_json::Value>,
    ablation: Option<String>,
    efficiency: Option<Efficiency>,
}

#[derive(Deserialize)]
struct Compared {
    #[serde(flatten)]
    model: FileModel,
    cache_dtype: Option<String>,
    #[serde(default)]
    difference: serde_json::Map<String, serde_json::Value>,
}

impl TaskResult {
    /// Its values; the first is the one that the task is known for.
    pub fn values(&self) -> Vec<Value> {
        let all = [
            ("acc", self.acc),
            ("acc_norm", self.acc_norm),
            ("acc_bytes", self.acc_bytes),
            ("score", self.score),
            ("perplexity", self.perplexity),
        ];
        let value = |(metric, value): (&'static str, Option<f64>)| {
            Some(Value { metric, value: value?, interval: self.intervals.get(metric).copied() })
        };
        all.into_iter().filter_map(value).collect()
    }

    /// The value that the task is known for.
    pub fn first(&self) -> Option<Value> {
        self.values().into_iter().next()
    }
}

impl Subject {
    /// Whether it is a student, as its file says.
    pub fn is_student(&self) -> bool {
        self.role == Some(Role::Student)
    }

    /// Its name, and that it is the teacher.
    pub fn label(&self) -> String {
        match self.role {
            Some(Role::Teacher) => format!("{} (teacher)", self.name),
            _ => self.name.clone(),
        }
    }

    /// Its result of a task.
    pub fn task(&self, name: &str) -> Option<&TaskResult> {
        self.tasks.iter().find(|(task, _)| task == name).map(|(_, result)| result)
    }
}

impl Difference {
    /// What `of` has more than `than` in a task's metric, if that is what was measured.
    pub fn between(&self, of: &str, than: &str, task: &str, metric: &str) -> Option<Interval> {
        let (_, found) = self.task(task).iter().find(|(name, _)| name == metric)?;
        let Interval { mean, low, high } = *found;
        match (self.first == of && self.other == than, self.first == than && self.other == of) {
            (true, _) => Some(*found),
            (_, true) => Some(Interval { mean: -mean, low: -high, high: -low }),
            _ => None,
        }
    }

    /// By metric, of a task.
    pub fn task(&self, name: &str) -> &[(String, Interval)] {
        let found = self.tasks.iter().find(|(task, _)| task == name);
        found.map_or(&[], |(_, metrics)| metrics)
    }
}

impl Results {
    /// Reads files and puts together what they say of one model.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else; two that disagree about a task of a model.
    pub fn read(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let mut results = Self {
            subjects: Vec::new(),
            differences: Vec::new(),
            skipped: Vec::new(),
            settings: Vec::new(),
            made: Vec::new(),
        };
        let (mut dtypes, mut seeds) = (Vec::new(), Vec::new());
        for path in paths {
            let file = read_file(path)?;
            let first = file.first.model.clone();
            results.add(file.first, path)?;
            add_once(&mut dtypes, file.cache_dtype);
            for Compared { model, cache_dtype, difference } in file.compare {
                add_once(&mut dtypes, cache_dtype);
                let tasks = difference.into_iter().map(|(task, metrics)| {
                    let metrics: BTreeMap<String, Interval> = serde_json::from_value(metrics)?;
                    Ok((task, metrics.into_iter().collect()))
                });
                let tasks = tasks
                    .collect::<serde_json::Result<_>>()
                    .map_err(|error| no_result(path, &error))?;
                let (other, ablation) = (model.model.clone(), model.ablation.clone());
                results.add_difference(Difference { first: first.clone(), other, ablation, tasks });
                results.add(model, path)?;
            }
            results.skipped.extend(file.skipped.into_iter().map(
                |FileSkipped { ablation, why }| LeftOut { first: first.clone(), ablation, why },
            ));
            add_once(&mut seeds, file.seed.map(|seed| seed.to_string()));
            results.made.extend(file.provenance);
        }
        results.subjects.sort_by_key(|subject| subject.ablation.is_some());
        results.name();
        results.find_teacher();
        results.settings = vec![("Cache rows", dtypes), ("Seed", seeds)];
        results.settings.retain(|(_, values)| !values.is_empty());
        Ok(results)
    }

    /// Models as they came.
    pub fn models(&self) -> impl Iterator<Item = &Subject> {
        self.subjects.iter().filter(|subject| subject.ablation.is_none())
    }

    /// Variants of `--ablate`.
    pub fn variants(&self) -> impl Iterator<Item = &Subject> {
        self.subjects.iter().filter(|subject| subject.ablation.is_some())
    }

    /// Every task that any model was asked, in the order they appear, with a result of it.
    pub fn tasks(&self) -> Vec<(&str, &TaskResult)> {
        let mut tasks: Vec<(&str, &TaskResult)> = Vec::new();
        for (name, result) in self.subjects.iter().flat_map(|subject| &subject.tasks) {
            if !tasks.iter().any(|(known, _)| known == name) {
                tasks.push((name, result));
            }
        }
        tasks
    }

    fn add(&mut self, model: FileModel, path: &Path) -> anyhow::Result<()> {
        let FileModel { model, student, base, tasks, ablation, efficiency } = model;
        let at = self.subjects.iter().position(|subject| subject.model == model);
        let at = at.unwrap_or_else(|| {
            let (name, tasks) = (model.clone(), Vec::new());
            let model = model.clone();
            let (role, base, efficiency) = (None, None, None);
            self.subjects.push(Subject { name, model, role, base, ablation, tasks, efficiency });
            self.subjects.len() - 1
        });
        let subject = &mut self.subjects[at];
        subject.base = subject.base.take().or(base);
        // Whether a model that is no student is the teacher, all files together say.
        subject.role = subject.role.or(student.filter(|&student| student).map(|_| Role::Student));
        subject.efficiency = subject.efficiency.take().or(efficiency);
        for (task, result) in tasks {
            let result: TaskResult =
                serde_json::from_value(result).map_err(|error| no_result(path, &error))?;
            match subject.task(&task) {
                Some(known) if *known == result => {}
                Some(_) => {
                    return Err(user(
                        format!(
                            "{}: another file says otherwise of {task} of {model}",
                            path.display()
                        ),
                        "give one result of each task and model: other items, seeds or cache dtypes do not go into one table",
                    ));
                }
                None => subject.tasks.push((task, result)),
            }
        }
        Ok(())
    }

    /// The teacher is the model with softmax attention that a student names as its base or, if there is but one such model, that.
    fn find_teacher(&mut self) {
        let students = || self.models().filter(|model| model.role == Some(Role::Student));
        let bases: Vec<&str> = students().filter_map(|student| student.base.as_deref()).collect();
        let softmax = self.subjects.iter().enumerate().filter(|(_, subject)| {
            subject.role.is_none() && subject.base.is_some() && subject.ablation.is_none()
        });
        let softmax: Vec<usize> = softmax.map(|(at, _)| at).collect();
        let names_it = |at: &&usize| {
            let subject = &self.subjects[**at];
            let base = subject.base.as_deref();
            bases.iter().any(|&named| Some(named) == base || named == subject.model)
        };
        let teacher = softmax.iter().find(names_it).copied();
        let only = (softmax.len() == 1 && students().next().is_some()).then(|| softmax[0]);
        if let Some(at) = teacher.or(only) {
            self.subjects[at].role = Some(Role::Teacher);
        }
    }

    /// The teacher, if one is known.
    pub fn teacher(&self) -> Option<&Subject> {
        self.models().find(|model| model.role == Some(Role::Teacher))
    }

    /// What `of` has more than `than`, of models as they came.
    pub fn difference(
        &self,
        of: &Subject,
        than: &Subject,
        task: &str,
        metric: &str,
    ) -> Option<Interval> {
        let pairs = self.differences.iter().filter(|pair| pair.ablation.is_none());
        pairs.filter_map(|pair| pair.between(&of.name, &than.name, task, metric)).next()
    }

    /// Two models have one difference, whatever files it comes from.
    fn add_difference(&mut self, new: Difference) {
        let names = |of: &Difference| (of.first.clone(), of.other.clone(), of.ablation.clone());
        match self.differences.iter_mut().find(|known| names(known) == names(&new)) {
            None => self.differences.push(new),
            Some(known) => {
                let tasks = new.tasks.into_iter();
                let unknown: Vec<_> =
                    tasks.filter(|(task, _)| known.task(task).is_empty()).collect();
                known.tasks.extend(unknown);
            }
        }
    }

    /// The last parts of paths, where they tell the models apart.
    fn name(&mut self) {
        let names: Vec<String> =
            self.subjects.iter().map(|subject| short_name(&subject.model)).collect();
        for (n, subject) in self.subjects.iter_mut().enumerate() {
            if names.iter().filter(|name| **name == names[n]).count() == 1 {
                subject.name = names[n].clone();
            }
        }
        let of_pairs = self
            .differences
            .iter_mut()
            .flat_map(|difference| [&mut difference.first, &mut difference.other]);
        for name in of_pairs.chain(self.skipped.iter_mut().map(|left_out| &mut left_out.first)) {
            if let Some(subject) = self.subjects.iter().find(|known| known.model == *name) {
                *name = subject.name.clone();
            }
        }
    }
}

fn add_once(values: &mut Vec<String>, value: Option<String>) {
    values.extend(value.filter(|value| !values.contains(value)));
}

fn read_file(path: &Path) -> anyhow::Result<File> {
    let text = still_model::files::read_to_string(path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| no_result(path, &error))
}

fn no_result(path: &Path, error: &serde_json::Error) -> anyhow::Error {
    user(
        format!("{} is no result of `still eval --out`: {error}", path.display()),
        "name files that `still eval --out FILE` wrote, or the run directory of one `still linearize`",
    )
}
