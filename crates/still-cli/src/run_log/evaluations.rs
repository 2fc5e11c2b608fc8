//! Evaluations in the middle of a run.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lines;

/// Their file in the run directory.
pub(super) const FILE: &str = "evaluations.jsonl";

/// One line of `evaluations.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// The stage that it was made in.
    pub stage: String,
    /// After this step of the stage.
    pub step: usize,
    /// Whether it was the best until then.
    #[serde(default)]
    pub best: bool,
    /// What it took, wall clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Everything else, by name.
    #[serde(flatten)]
    values: Map<String, Value>,
}

impl Evaluation {
    /// What was measured: name and number.
    pub fn metrics(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)))
    }

    /// One of the metrics.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.values.get(name)?.as_f64()
    }
}

/// What a metric is called, for people.
pub fn metric_words(name: &str) -> String {
    match name {
        "heldout_nll" => "held-out loss".into(),
        "passkey_recall" => "pass-key recall".into(),
        "repeated_nll" => "repeated-text loss".into(),
        _ => name.replace('_', " "),
    }
}

/// Reads the evaluations of a run as they are written.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    read: u64,
}

impl Follower {
    /// Evaluations from now on; those in the file are an earlier run's.
    pub fn new(run_dir: &Path) -> Self {
        let path = run_dir.join(FILE);
        let read = path.metadata().map_or(0, |data| data.len());
        Self { path, read }
    }

    /// The evaluations since the last call.
    ///
    /// # Errors
    /// A file that cannot be read, a line that cannot be understood (it is passed over then).
    pub fn new_ones(&mut self) -> anyhow::Result<Vec<Evaluation>> {
        // No file: nothing is evaluated.
        let length = self.path.metadata().map_or(0, |data| data.len());
        if length <= self.read {
            self.read = length;
            return Ok(Vec::new());
        }
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        // A line without its end is still being written.
        bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1));
        self.read += bytes.len() as u64;
        lines::parse(&bytes, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_whole_new_lines_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let line = |step| format!(r#"{{"stage":"transfer","step":{step},"heldout_nll":2.5}}"#);
        let path = dir.path().join(FILE);
        std::fs::write(&path, line(1) + "\n").unwrap();
        let mut follower = Follower::new(dir.path());
        assert!(follower.new_ones().unwrap().is_empty());
        let mut file = File::options().append(true).open(&path).unwrap();
        write!(file, "{}\n{}", line(2), &line(3)[..9]).unwrap();
        let found = follower.new_ones().unwrap();
        assert_eq!(found.iter().map(|evaluation| evaluation.step).collect::<Vec<_>>(), [2]);
        assert_eq!(found[0].metric("heldout_nll"), Some(2.5));
        writeln!(file, "{}", &line(3)[9..]).unwrap();
        assert_eq!(follower.new_ones().unwrap()[0].step, 3);
        assert!(follower.new_ones().unwrap().is_empty());
    }

    #[test]
    fn metrics_are_whatever_is_a_number() {
        let line = r#"{"stage":"finetune","step":4,"repeated_nll":0.25,"note":"x","best":true,"seconds":2}"#;
        let evaluation: Evaluation = serde_json::from_str(line).unwrap();
        assert_eq!(evaluation.metrics().collect::<Vec<_>>(), [("repeated_nll", 0.25)]);
        assert!(evaluation.best);
        assert_eq!(evaluation.seconds, Some(2.0));
    }
}
