//! Evaluations during a run.

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::errors::user;

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
    /// What the trainer tells, as its file has it.
    ///
    /// # Errors
    /// One of another form.
    pub fn of(evaluation: &still_train::Evaluation) -> serde_json::Result<Self> {
        serde_json::from_value(serde_json::to_value(evaluation)?)
    }

    /// What was measured: name and number.
    pub fn metrics(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)))
    }

    /// One of the metrics.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.values.get(name)?.as_f64()
    }
}

/// `teacher.json`: what the run's evaluations ask, asked of the teacher.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TeacherEvaluation {
    /// What it took, wall clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Everything else, by name.
    #[serde(flatten)]
    values: Map<String, Value>,
}

impl TeacherEvaluation {
    /// The one in a run directory, if there is one.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(run_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = run_dir.join(still_train::TEACHER_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = still_model::files::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let read = serde_json::from_str(&text).map_err(|error| {
            let what = format!("{}: {error}", path.display());
            user(what, "the file is damaged: delete it; `still linearize --resume` writes it again")
        })?;
        Ok(Some(read))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_trainer_tells_is_what_its_file_says() {
        let line = r#"{"stage":"transfer","step":2,"heldout_nll":2.5,"best":true,"seconds":1.5}"#;
        let told: still_train::Evaluation = serde_json::from_str(line).unwrap();
        let told = Evaluation::of(&told).unwrap();
        assert_eq!((told.stage.as_str(), told.step, told.best), ("transfer", 2, true));
        assert_eq!(told.seconds, Some(1.5));
        assert_eq!(told.metrics().collect::<Vec<_>>(), [("heldout_nll", 2.5)]);
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
