//! MMLU: every subject has its own examples, which come before each of its questions.

use std::path::Path;

use super::Item;
use super::data::{ChoiceRecord, read_lines};
use super::standard::choice_item;
use crate::error::{EvalError, Result};

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// The items of `limit` questions, spread over the subjects in the file's order: each gives its first.
///
/// # Errors
/// As of [`super::standard()`]; a subject with fewer than `shots` examples.
pub fn items(test: &Path, dev: &Path, shots: usize, limit: Option<usize>) -> Result<Vec<Item>> {
    let questions = by_subject(read_lines(test, |_, record| checked(record))?);
    let examples = if shots == 0 {
        Vec::new()
    } else {
        by_subject(read_lines(dev, |_, record| checked(record))?)
    };
    let sizes: Vec<usize> = questions.iter().map(|(_, records)| records.len()).collect();
    let mut items = Vec::new();
    for ((subject, records), count) in questions.into_iter().zip(spread(&sizes, limit)) {
        let known = examples.iter().find(|(other, _)| *other == subject);
        let known = known.map_or(&[][..], |(_, records)| records.as_slice());
        if known.len() < shots {
            return Err(EvalError::Argument(format!(
                "{}: {} examples of {subject}, {shots} are asked for",
                dev.display(),
                known.len(),
            )));
        }
        let beginning = beginning(&subject, &known[..shots]);
        for (n, record) in records.into_iter().take(count).enumerate() {
            let context = format!("{beginning}{}", question(&record));
            let letters = LETTERS.map(str::to_owned).to_vec();
            let item = choice_item(format!("{subject}/{n}"), &context, letters, record.gold);
            items.push(Item { group: Some(subject.clone()), ..item });
        }
    }
    Ok(items)
}

fn checked(record: ChoiceRecord) -> std::result::Result<(String, ChoiceRecord), String> {
    let record = record.checked()?;
    if record.choices.len() != LETTERS.len() {
        return Err(format!("{} choices, MMLU has {}", record.choices.len(), LETTERS.len()));
    }
    let subject = record.subject.clone().ok_or("missing field `subject`")?;
    Ok((subject, record))
}

/// Subjects in the order of their first record.
fn by_subject(records: Vec<(String, ChoiceRecord)>) -> Vec<(String, Vec<ChoiceRecord>)> {
    let mut subjects: Vec<(String, Vec<ChoiceRecord>)> = Vec::new();
    for (subject, record) in records {
        // Files keep subjects together: the last one is the likeliest.
        match subjects.iter_mut().rev().find(|(other, _)| *other == subject) {
            Some((_, records)) => records.push(record),
            None => subjects.push((subject, vec![record])),
        }
    }
    subjects
}

/// How many of each, `limit` in all: one of each in turn, as long as there are more.
fn spread(sizes: &[usize], limit: Option<usize>) -> Vec<usize> {
    let mut left = limit.unwrap_or(usize::MAX).min(sizes.iter().sum());
    let mut counts = vec![0; sizes.len()];
    while left > 0 {
        for (count, &size) in counts.iter_mut().zip(sizes) {
            if *count < size && left > 0 {
                *count += 1;
                left -= 1;
            }
        }
    }
    counts
}

fn beginning(subject: &str, examples: &[ChoiceRecord]) -> String {
    let mut text = format!(
        "The following are multiple choice questions (with answers) about {}.\n\n",
        subject.split('_').collect::<Vec<_>>().join(" ")
    );
    for example in examples {
        text += &format!("{} {}\n\n", question(example), LETTERS[example.gold]);
    }
    text
}

fn question(record: &ChoiceRecord) -> String {
    let mut text = record.query.trim().to_owned();
    for (letter, choice) in LETTERS.iter().zip(&record.choices) {
        text += &format!("\n{letter}. {choice}");
    }
    text + "\nAnswer:"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_spread() {
        assert_eq!(spread(&[5, 1, 5], Some(7)), [3, 1, 3]);
        assert_eq!(spread(&[5, 1, 5], Some(2)), [1, 1, 0]);
        assert_eq!(spread(&[5, 1, 5], Some(99)), [5, 1, 5]);
        assert_eq!(spread(&[5, 1, 5], None), [5, 1, 5]);
        assert_eq!(spread(&[], Some(3)), [0; 0]);
    }
}
