//! `recipes/still-released.toml` on a tiny model: instructions as data, and a run that stops and goes on.

mod common;

use std::path::Path;

use common::{StopAfter, model, parameters};
use still_model::{LoraTarget, Model, Tokenizer};
use still_train::{
    Evaluation, Observer, Recipe, Silent, StepReport, TokenCache, TrainError, Windows,
    linearize_windows,
};

/// The recipe, cut to the size of a test.
fn recipe() -> Recipe {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/still-released.toml");
    let plateau = "schedule={ plateau = { factor = 0.5, patience = 0, threshold = 0.02 } }";
    let set: Vec<String> = [
        "attention.chunk=8",
        "attention.budget=1",
        "data.length=420",
        "data.heldout=0.2",
        "transfer.steps=5",
        "transfer.batch=2",
        "finetune.steps=5",
        "finetune.batch=2",
        "finetune.lora.rank=2",
        "evaluation.every=1",
        "evaluation.windows=2",
        // The last student, which has its low-rank updates.
        "evaluation.keep_best=false",
        "checkpoint.every=2",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain(["transfer", "finetune"].map(|stage| format!("{stage}.optimizer.{plateau}")))
    .collect();
    Recipe::parse(&std::fs::read_to_string(path).unwrap(), &set).unwrap()
}

/// The tiny model with a tokenizer that names its end of sequence, and instructions.
fn start(dir: &Path) -> (Model, Windows) {
    let model = model();
    model.tokenizer.save(dir).unwrap();
    let config = dir.join("tokenizer_config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    json["eos_token"] = "<|im_end|>".into();
    std::fs::write(&config, json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_hf_dir(dir).unwrap();
    let lines = (0..16).map(|n| {
        let output = format!("{} and {n}", "abc".repeat(n));
        serde_json::json!({ "instruction": format!("Count to {n}."), "output": output }).to_string()
    });
    let file = dir.join("alpaca.jsonl");
    std::fs::write(&file, lines.collect::<Vec<_>>().join("\n")).unwrap();
    let cache = TokenCache::at(dir.join("tokens"));
    let windows = Windows::read(&[file], &tokenizer, &recipe().data, 3, &cache).unwrap();
    (Model { tokenizer, ..model }, windows)
}

fn log<T: serde::de::DeserializeOwned>(dir: &Path, file: &str) -> Vec<T> {
    let text = std::fs::read_to_string(dir.join(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn it_trains_and_resumes_exactly() {
    let data = tempfile::tempdir().unwrap();
    let (model, windows) = start(data.path());
    let recipe = recipe();
    let run = |dir: &Path, resume: bool, observer: &mut dyn Observer| {
        linearize_windows(&model, &recipe, &windows, dir, resume, observer)
    };
    let whole_dir = tempfile::tempdir().unwrap();
    let whole = run(whole_dir.path(), false, &mut Silent).unwrap();
    let student = whole.student.as_ref().unwrap();
    assert!(student.config.gate && student.has_lora(LoraTarget::G));
    let steps: Vec<StepReport> = log(whole_dir.path(), "metrics.jsonl");
    assert_eq!(steps.len(), 10);
    assert!(steps.iter().all(|step| step.loss.is_finite() && !step.skipped));
    // Both stages start at their rates; the plateau takes off from them.
    assert_eq!((steps[0].lr, steps[5].lr), (1e-2, 1e-4));
    assert!(
        steps.iter().any(|step| step.lr < if step.stage == steps[0].stage { 1e-2 } else { 1e-4 })
    );

    let dir = tempfile::tempdir().unwrap();
    for (resume, after) in [(false, 3), (true, 3), (true, 2)] {
        let stopped = run(dir.path(), resume, &mut StopAfter(after));
        assert!(matches!(stopped, Err(TrainError::Interrupted { .. })));
    }
    let resumed = run(dir.path(), true, &mut Silent).unwrap();
    assert_eq!(parameters(&resumed), parameters(&whole));
    assert_eq!(log::<StepReport>(dir.path(), "metrics.jsonl"), steps);
    let losses = |dir: &Path| -> Vec<_> {
        let lines: Vec<Evaluation> = log(dir, "evaluations.jsonl");
        lines.into_iter().map(|line| line.heldout_nll).collect()
    };
    assert_eq!(losses(dir.path()), losses(whole_dir.path()));
}

/// Packed, each instruction is a sequence of its own that counts from its answer on.
#[test]
fn only_answers_are_learned_from() {
    let data = tempfile::tempdir().unwrap();
    let (_, windows) = start(data.path());
    let mut position = still_train::Position::default();
    for window in windows.next(&mut position, windows.len()) {
        for segment in window.segments() {
            let counted = segment.counted.unwrap();
            let answer = counted.iter().position(|&counted| counted).unwrap();
            assert!(answer > 100, "the prompt comes first");
            assert!(counted[answer..].iter().all(|&counted| counted));
            assert_eq!(segment.ids.last(), Some(&257), "the end counts too");
        }
    }
}
