//! The harness's short tasks over local files: the prompts are its own, letter by letter.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::data::{ChoiceRecord, check_gold, read_lines};
use super::hellaswag::{capitalize_beginning, preprocess};
use super::{Choice, Item, Metric, Question, Request, Task, mmlu};
use crate::error::{EvalError, Result};

/// The tasks of [`standard`].
pub const STANDARD: [&str; 7] =
    ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu", "lambada_openai"];

/// Examples before a question of MMLU, if nothing else is said.
const MMLU_SHOTS: usize = 5;

/// Which items of a task, and how they are asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct StandardOptions {
    /// The first so many items; of MMLU so many in all, spread over its subjects.
    pub limit: Option<usize>,
    /// Examples before each question of MMLU; 5 without it. The other tasks have none.
    pub shots: Option<usize>,
}

/// Reads a task's items from `data_dir`: `NAME.jsonl`, of MMLU `mmlu_test.jsonl` and `mmlu_dev.jsonl`.
///
/// # Errors
/// An unknown name, a missing file, a line that is not as docs/evaluation.md says.
pub fn standard(name: &str, data_dir: &Path, options: &StandardOptions) -> Result<Task> {
    let file = |name: &str| data_dir.join(format!("{name}.jsonl"));
    let with_norm = vec![Metric::Acc, Metric::AccNorm, Metric::AccBytes];
    let (mut items, metrics) = match name {
        "piqa" => (choices(file(name), |query| format!("{query}Answer:"))?, with_norm),
        "arc_easy" | "arc_challenge" => {
            (choices(file(name), |query| format!("Question: {query}\nAnswer:"))?, with_norm)
        }
        "hellaswag" => (hellaswag(&file(name))?, with_norm),
        "winogrande" => (winogrande(&file(name))?, vec![Metric::Acc]),
        "lambada_openai" => (lambada(&file(name))?, vec![Metric::Acc, Metric::Perplexity]),
        "mmlu" => {
            let shots = options.shots.unwrap_or(MMLU_SHOTS);
            let (test, dev) = (file("mmlu_test"), file("mmlu_dev"));
            (mmlu::items(&test, &dev, shots, options.limit)?, vec![Metric::Acc])
        }
        other => return Err(EvalError::Argument(format!("no task is called {other}"))),
    };
    items.truncate(options.limit.unwrap_or(usize::MAX));
    Ok(Task { name: name.to_owned(), items, metrics, length: None })
}

/// An item whose choices follow one context.
pub(super) fn choice_item(id: String, context: &str, choices: Vec<String>, gold: usize) -> Item {
    let requests = choices
        .iter()
        .map(|choice| Request { context: context.to_owned(), continuation: format!(" {choice}") })
        .collect();
    let choice = Choice { requests, choices, gold };
    Item { id, group: None, question: Question::Choice(choice) }
}

fn choices(path: PathBuf, context: impl Fn(&str) -> String) -> Result<Vec<Item>> {
    read_lines(&path, |index, record: ChoiceRecord| {
        let record = record.checked()?;
        Ok(choice_item(index.to_string(), &context(&record.query), record.choices, record.gold))
    })
}

fn hellaswag(path: &Path) -> Result<Vec<Item>> {
    read_lines(path, |index, record: ChoiceRecord| {
        let record = record.checked()?;
        let query = preprocess(&capitalize_beginning(&record.query));
        let choices: Vec<String> = record.choices.iter().map(|text| preprocess(text)).collect();
        if choices.iter().any(String::is_empty) {
            return Err("a choice is empty without its brackets".into());
        }
        Ok(choice_item(index.to_string(), &query, choices, record.gold))
    })
}

/// WinoGrande's partial scoring: the same words after either name.
#[derive(Debug, Deserialize)]
struct WinograndeRecord {
    context_options: Vec<String>,
    continuation: String,
    gold: usize,
}

fn winogrande(path: &Path) -> Result<Vec<Item>> {
    read_lines(path, |index, record: WinograndeRecord| {
        check_gold(record.gold, record.context_options.len())?;
        if record.continuation.trim().is_empty() {
            return Err("the continuation is empty".into());
        }
        let continuation = format!(" {}", record.continuation);
        let requests = record
            .context_options
            .iter()
            .map(|context| Request { context: context.clone(), continuation: continuation.clone() })
            .collect();
        let choice = Choice { requests, choices: record.context_options, gold: record.gold };
        Ok(Item { id: index.to_string(), group: None, question: Question::Choice(choice) })
    })
}

/// A passage without its last word, and that word.
#[derive(Debug, Deserialize)]
struct LambadaRecord {
    context: String,
    continuation: String,
}

fn lambada(path: &Path) -> Result<Vec<Item>> {
    read_lines(path, |index, record: LambadaRecord| {
        if record.continuation.trim().is_empty() {
            return Err("the continuation is empty".into());
        }
        let continuation = format!(" {}", record.continuation);
        let question = Question::Continuation(Request { context: record.context, continuation });
        Ok(Item { id: index.to_string(), group: None, question })
    })
}
