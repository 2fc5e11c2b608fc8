//! RULER's question answering: the paragraph that a question is about among many others.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::draft::Draft;
use super::family::Family;
use super::judge::Judge;
use super::text::{malformed, read};
use crate::error::Result;

/// Questions in the order of their file. Units are documents.
#[derive(Debug)]
pub(super) struct Questions {
    /// Different documents, in order of their text.
    documents: Vec<String>,
    questions: Vec<Question>,
}

#[derive(Debug)]
struct Question {
    query: String,
    answers: Vec<String>,
    /// Documents that are always given.
    needed: Vec<usize>,
    /// Documents that are given before any other: the rest of the same article.
    related: Vec<usize>,
}

/// A question and its documents, by text.
struct Raw {
    query: String,
    answers: Vec<String>,
    needed: Vec<String>,
    related: Vec<String>,
}

impl Questions {
    /// Reads SQuAD's format; questions that cannot be answered are left out.
    pub fn squad(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct File {
            data: Vec<Article>,
        }
        #[derive(Deserialize)]
        struct Article {
            paragraphs: Vec<Paragraph>,
        }
        #[derive(Deserialize)]
        struct Paragraph {
            context: String,
            qas: Vec<Asked>,
        }
        #[derive(Deserialize)]
        struct Asked {
            question: String,
            answers: Vec<Answer>,
            #[serde(default)]
            is_impossible: bool,
        }
        #[derive(Deserialize)]
        struct Answer {
            text: String,
        }
        let mut raw = Vec::new();
        for article in json::<File>(path)?.data {
            let contexts: Vec<String> =
                article.paragraphs.iter().map(|paragraph| paragraph.context.clone()).collect();
            for Paragraph { context, qas } in article.paragraphs {
                for asked in qas.into_iter().filter(|asked| !asked.is_impossible) {
                    raw.push(Raw {
                        query: asked.question,
                        answers: asked.answers.into_iter().map(|answer| answer.text).collect(),
                        needed: vec![context.clone()],
                        related: contexts.iter().filter(|&c| *c != context).cloned().collect(),
                    });
                }
            }
        }
        Self::new(path, raw)
    }

    /// Reads HotpotQA's format: a question's own documents are the right and the distracting ones.
    pub fn hotpotqa(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Asked {
            question: String,
            answer: String,
            context: Vec<(String, Vec<String>)>,
        }
        let raw = json::<Vec<Asked>>(path)?.into_iter().map(|asked| Raw {
            query: asked.question,
            answers: vec![asked.answer],
            needed: asked
                .context
                .into_iter()
                .map(|(title, sentences)| format!("{title}\n{}", sentences.concat()))
                .collect(),
            related: Vec::new(),
        });
        Self::new(path, raw.collect())
    }

    fn new(path: &Path, mut raw: Vec<Raw>) -> Result<Self> {
        raw.retain(|raw| !raw.answers.is_empty());
        if raw.is_empty() {
            return Err(malformed(path, 1, "there is no question with an answer in it"));
        }
        let texts = raw.iter().flat_map(|raw| raw.needed.iter().chain(&raw.related));
        let documents: Vec<String> = texts.cloned().collect::<BTreeSet<_>>().into_iter().collect();
        let index: BTreeMap<&str, usize> =
            documents.iter().enumerate().map(|(i, text)| (text.as_str(), i)).collect();
        // Each once, in the order given.
        let indices = |texts: &[String]| {
            let mut seen = BTreeSet::new();
            let indices = texts.iter().map(|text| index[text.as_str()]);
            indices.filter(|&i| seen.insert(i)).collect::<Vec<_>>()
        };
        let questions = raw
            .iter()
            .map(|raw| Question {
                query: raw.query.clone(),
                answers: raw.answers.clone(),
                needed: indices(&raw.needed),
                related: indices(&raw.related),
            })
            .collect();
        Ok(Self { documents, questions })
    }
}

fn json<A: DeserializeOwned>(path: &Path) -> Result<A> {
    serde_json::from_str(&read(path)?).map_err(|error| {
        let reason = error.to_string();
        // The parser says the line at the end.
        let reason = reason.split(" at line ").next().unwrap_or_default();
        malformed(path, error.line(), reason)
    })
}

impl Family for Questions {
    fn available(&self) -> Option<usize> {
        Some(self.questions.len())
    }

    fn units(&self, index: usize) -> RangeInclusive<usize> {
        self.questions[index].needed.len()..=self.documents.len()
    }

    fn draft(&self, index: usize, units: usize, mut rng: ChaCha8Rng) -> Draft {
        let question = &self.questions[index];
        let mut order = question.needed.clone();
        let mut related = question.related.clone();
        related.shuffle(&mut rng);
        order.extend(related);
        if units > order.len() {
            let given: BTreeSet<usize> = order.iter().copied().collect();
            let mut others: Vec<usize> =
                (0..self.documents.len()).filter(|i| !given.contains(i)).collect();
            others.shuffle(&mut rng);
            order.extend(others);
        }
        order.truncate(units);
        order.shuffle(&mut rng);
        let documents: Vec<String> = order
            .into_iter()
            .enumerate()
            .map(|(i, document)| format!("Document {}:\n{}", i + 1, self.documents[document]))
            .collect();
        const TASK: &str = "Answer the question based on the given documents. \
                            Only give me the answer and do not output any other words.";
        let before = format!(
            "{TASK}\n\nThe following are given documents.\n\n{}\n\n",
            documents.join("\n\n")
        );
        let asked = format!("{TASK}\n\nQuestion: {}", question.query);
        let answer_prefix = " Answer:".to_owned();
        Draft::new(before, &asked, answer_prefix, question.answers.clone(), Judge::Part)
    }
}
