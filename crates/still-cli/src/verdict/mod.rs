//! The comparison of a student with its teacher: measurements, a table and a sentence.
//!
//! | file | content |
//! |---|---|
//! | `row` | what was measured of one model |
//! | `rows` | the table of several models |
//! | `words` | the sentence, and what to do next |
//! | `yardstick` | how much is measured in a given time |
//! | `judge` | the verdict of a run |
//! | `samples` | short texts of teacher and student |

mod judge;
mod row;
mod rows;
mod samples;
mod words;
mod yardstick;

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use still_model::files::write_file;

pub use self::judge::{Judged, judge};
pub use self::row::{Recall, Row, TEACHER};
pub use self::rows::{lines, table};
pub use self::samples::{Sample, samples};
pub use self::words::{Quality, cost};
pub use self::yardstick::{HELDOUT, book_windows, measure, usual_rows};
use crate::errors::user;
use crate::table::WIDTH;
use crate::wrap::{quoted, wrapped};

/// Its file in a run directory.
const FILE: &str = "verdict.json";

/// What a run's student came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// The student compared with its teacher, in a sentence.
    pub sentence: String,
    /// Teacher, untrained and trained student.
    pub rows: Vec<Row>,
    /// One text of teacher and student each.
    pub samples: Vec<Sample>,
    /// What to do next, a line each.
    pub next: Vec<String>,
    /// Where held-out windows came from.
    pub heldout: String,
    /// Tokens of the context at which cache and speed were measured.
    pub context: usize,
    /// Format of the student's exact rows.
    pub cache_rows: String,
    /// The same of the teacher.
    pub teacher_cache_rows: String,
    /// The base model.
    pub base: String,
    /// Wall-clock seconds that it took.
    pub seconds: f64,
}

impl Verdict {
    /// The verdict in a run directory; none if the run has none yet.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(run_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = run_dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = still_model::files::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let verdict = serde_json::from_str(&text).map_err(|error| {
            user(
                format!("{}: {error}", path.display()),
                "the file is damaged: delete it, or let `still linearize --resume` write it again",
            )
        })?;
        Ok(Some(verdict))
    }

    /// Writes it into a run directory, complete or not at all.
    ///
    /// # Errors
    /// A disk that cannot be written.
    pub fn write(&self, run_dir: &Path) -> anyhow::Result<()> {
        let path = run_dir.join(FILE);
        let json = serde_json::to_string_pretty(self)?;
        write_file(&path, format!("{json}\n").as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes the verdict of an earlier student.
    ///
    /// # Errors
    /// A disk that cannot be written.
    pub fn remove(run_dir: &Path) -> anyhow::Result<()> {
        let path = run_dir.join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// As text for a terminal of 80 columns.
    pub fn render(&self) -> String {
        let mut parts = vec![table(&self.rows), wrapped(&self.sentence, WIDTH), self.measured()];
        parts.extend(self.samples.iter().map(|sample| {
            let asked = format!("{}, asked {:?}:", sample.model, sample.prompt);
            let text = quoted(sample.text.trim(), WIDTH - 2).replace('\n', "\n  ");
            format!("{}\n  {text}", wrapped(&asked, WIDTH))
        }));
        let next: Vec<String> = self.next.iter().map(|line| format!("  {line}")).collect();
        parts.push(format!("Next:\n{}", next.join("\n")));
        parts.join("\n\n")
    }

    /// What the numbers are of.
    pub fn measured(&self) -> String {
        let Self { context, cache_rows, teacher_cache_rows, heldout, seconds, .. } = self;
        let context = crate::table::count(*context);
        let took = crate::table::seconds(*seconds);
        wrapped(
            &format!(
                "Cache and speed at {context} tokens; the teacher's cache in {teacher_cache_rows}, the student's exact rows \
                 in {cache_rows}. Held out: {heldout}. Measured in {took}."
            ),
            WIDTH,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict() -> Verdict {
        let words = "word ".repeat(60);
        Verdict {
            sentence: words.clone(),
            rows: vec![Row::named(TEACHER), Row::named("trained")],
            samples: vec![Sample {
                model: TEACHER.into(),
                prompt: "Why?".into(),
                text: words,
                sampling: "greedy".into(),
            }],
            next: vec!["still chat --model s".into()],
            heldout: "a book".into(),
            context: 2048,
            cache_rows: "int8".into(),
            teacher_cache_rows: "bf16".into(),
            base: "base".into(),
            seconds: 12.0,
        }
    }

    #[test]
    fn it_fits_a_terminal_of_80_columns() {
        for line in verdict().render().lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }

    #[test]
    fn it_survives_its_file_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Verdict::read(dir.path()).unwrap().is_none());
        verdict().write(dir.path()).unwrap();
        let read = Verdict::read(dir.path()).unwrap().unwrap();
        assert_eq!(read.render(), verdict().render());
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        let error = Verdict::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains(FILE), "{error}");
        Verdict::remove(dir.path()).unwrap();
        Verdict::remove(dir.path()).unwrap();
        assert!(Verdict::read(dir.path()).unwrap().is_none());
    }
}
