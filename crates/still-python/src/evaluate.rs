//! Evaluation of tasks.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use serde_json::{Map, Value, json};
use still_attention::RowDtype;
use still_cli::{Asked, Plan, Questions};
use still_eval::long::LongFiles;
use still_eval::run::{AskOptions, Listener, Sample, TaskScores, ask};
use still_eval::task::Task;
use still_model::ModelError;

use crate::arguments::{positive, to_python};
use crate::callback::Callback;
use crate::model::Model;

/// Asks a model tasks, as `still eval` does; scores by task.
#[pyfunction]
#[pyo3(signature = (
    model, tasks, *, data_dir = PathBuf::from("data"), text = None, lengths = vec![1024], limit = None, shots = None,
    seed = 0, batch_size = 16, samples = false, progress = None
))]
pub fn evaluate<'py>(
    py: Python<'py>,
    model: &Model,
    tasks: &Bound<'py, PyAny>,
    data_dir: PathBuf,
    text: Option<PathBuf>,
    lengths: Vec<usize>,
    limit: Option<usize>,
    shots: Option<usize>,
    seed: u64,
    batch_size: usize,
    samples: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let tasks: Vec<String> = match tasks.cast::<PyString>() {
        Ok(one) => vec![one.extract()?],
        Err(_) => tasks.extract()?,
    };
    for &length in &lengths {
        positive("a length", length)?;
    }
    if let Some(limit) = limit {
        positive("limit", limit)?;
    }
    let batch_size = positive("batch_size", batch_size)?;
    let babi = Some(data_dir.join("babi"));
    let files = LongFiles { text, squad: None, hotpotqa: None, babi };
    let questions =
        Questions { data_dir, files, limit, shots, lengths, stride: None, chat: false, seed };
    let (shared, callback) = (model.shared.clone(), Callback::new(progress));
    let listener = CallbackListener(callback.clone());
    let answers = callback.work(py, move || {
        let model = &shared.model;
        let options =
            AskOptions { rows: model.cache_rows(RowDtype::F32), batch_size, compression: None };
        let mut answers = Map::new();
        for plan in Plan::of(&Asked::of(&tasks)?, &questions)? {
            let task = match plan {
                Plan::Ready(task) => task,
                Plan::Made(make) => make(model)?,
            };
            let asked = ask(model, &task, Vec::new(), &options, &listener)?;
            if !asked.complete {
                return Err(ModelError::Cancelled.into());
            }
            let mut scores = TaskScores::of(&task, &asked.samples)?.to_json();
            if samples {
                scores["samples"] = json!(asked.samples);
            }
            answers.insert(task.name, scores);
        }
        Ok(Value::Object(answers))
    })?;
    Ok(to_python(py, &answers)?.cast_into()?)
}

/// Tells a callable of every answer.
struct CallbackListener(Callback);

impl Listener for CallbackListener {
    fn answered(&self, task: &Task, sample: &Sample) -> still_eval::Result<()> {
        let (name, items) = (&task.name, task.items.len());
        self.0.tell(&json!({ "event": "answer", "task": name, "id": sample.id, "of": items }));
        Ok(())
    }

    fn stop(&self) -> bool {
        self.0.cancel().is_raised()
    }
}
