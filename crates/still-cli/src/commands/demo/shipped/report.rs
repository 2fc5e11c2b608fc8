//! The comparison, as a table and as JSON.

use anyhow::Context;
use serde::Serialize;
use still_eval::run::{Answer, Sample};
use still_eval::task::Metric;

use super::document::{FACTS, questions};
use crate::table::{WIDTH, seconds};
use crate::verdict::{Quality, Row, table};
use crate::wrap::{quoted, wrapped};

/// The object that `still demo --json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The student compared with its teacher, in a sentence.
    pub sentence: String,
    /// Teacher and student.
    pub rows: [Row; 2],
    /// Questions about the planted facts.
    pub facts: Vec<Question>,
    /// The open question.
    pub open: Vec<Question>,
    /// Wall-clock seconds in all.
    pub seconds: f64,
    /// What ran.
    pub setting: Setting,
}

/// What was asked, and both answers.
#[derive(Debug, Serialize)]
pub struct Question {
    question: String,
    teacher: Said,
    student: Said,
}

#[derive(Debug, Serialize)]
struct Said {
    answer: String,
    /// Of a fact.
    #[serde(skip_serializing_if = "Option::is_none")]
    right: Option<bool>,
}

/// What a reader needs to compare two reports.
#[derive(Debug, Serialize)]
pub struct Setting {
    /// Version of `still`.
    pub version: &'static str,
    /// The student.
    pub student: String,
    /// Its base.
    pub base: String,
    /// Where it ran.
    pub device: &'static str,
    /// Threads of the operator.
    pub threads: usize,
    /// Number format of the student's exact rows.
    pub cache_rows: &'static str,
    /// The same of the teacher.
    pub teacher_cache_rows: &'static str,
    /// Tokens of the document.
    pub context: usize,
    /// Seed of pass keys.
    pub seed: u64,
}

/// What both models answered to a task's questions.
///
/// # Errors
/// If the embedded questions are damaged, or a question was not asked.
pub fn answers(
    task: &str,
    teacher: &[Sample],
    student: &[Sample],
) -> anyhow::Result<Vec<Question>> {
    let said = |samples: &[Sample], n: usize| -> anyhow::Result<Said> {
        let sample = samples.get(n).context("a question about the document was not asked")?;
        let answer = match &sample.answer {
            Answer::Generation { text, .. } => text.trim().to_owned(),
            _ => String::new(),
        };
        let score = sample.scores.get(&Metric::Score).filter(|_| task == FACTS);
        Ok(Said { answer, right: score.map(|&score| score == 1.0) })
    };
    let questions = questions(task)?.into_iter().enumerate();
    let asked = questions.map(|(n, question)| {
        Ok(Question { question, teacher: said(teacher, n)?, student: said(student, n)? })
    });
    asked.collect()
}

impl Report {
    /// Compares the rows.
    pub fn new(
        rows: [Row; 2],
        facts: Vec<Question>,
        open: Vec<Question>,
        setting: Setting,
        seconds: f64,
    ) -> Self {
        let [teacher, student] = &rows;
        let sentence = Quality::of(teacher, student).sentence(teacher, student);
        Self { sentence, rows, facts, open, seconds, setting }
    }

    /// As text for a terminal of 80 columns.
    pub fn render(&self) -> String {
        let Self { setting, .. } = self;
        let mut parts = vec![table(&self.rows), wrapped(&self.sentence, WIDTH)];
        for question in self.facts.iter().take(1).chain(&self.open) {
            let said = |name: &str, said: &Said| {
                quoted(&format!("{name}: {}", said.answer), WIDTH - 2).replace('\n', "\n  ")
            };
            parts.push(format!(
                "{}\n  {}\n  {}",
                wrapped(&format!("Asked about the document: {}", question.question), WIDTH),
                said("teacher", &question.teacher),
                said("student", &question.student),
            ));
        }
        let context = crate::table::count(setting.context);
        parts.push(wrapped(
            &format!(
                "A document of {context} tokens with {} planted facts, read once by each. The teacher's cache is in {}, the \
                 student's exact rows in {}. {} threads, {}.",
                self.facts.len(),
                setting.teacher_cache_rows,
                setting.cache_rows,
                setting.threads,
                seconds(self.seconds),
            ),
            WIDTH,
        ));
        parts.push(format!(
            "Next:\n  still ask --model {0} --file FILE 'QUESTION'\n  still chat --model {0}\n  \
             still linearize --model {1} --data TEXT --out my-student",
            setting.student, setting.base
        ));
        parts.join("\n\n")
    }
}
