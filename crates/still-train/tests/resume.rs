//! A run that stops and goes on is the run that never stopped.

mod common;

use std::path::Path;

use common::{StopAfter, model, parameters, recipe, windows};
use still_model::Model;
use still_train::{Silent, Stage, TrainError, Windows, linearize_windows};

fn metrics(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn resumed_equals_uninterrupted_bit_for_bit() {
    let (model, windows) = (model(), windows());
    let recipe = recipe(&["finetune.train_attention=false"]);
    let whole_dir = tempfile::tempdir().unwrap();
    let whole =
        linearize_windows(&model, &recipe, &windows, whole_dir.path(), false, &mut Silent).unwrap();
    // Stops in the first stage, at its very end, and in the second.
    for stops in [vec![4], vec![10], vec![2, 5, 6]] {
        let dir = tempfile::tempdir().unwrap();
        for (i, &after) in stops.iter().enumerate() {
            let stopped = linearize_windows(
                &model,
                &recipe,
                &windows,
                dir.path(),
                i > 0,
                &mut StopAfter(after),
            );
            assert!(matches!(stopped, Err(TrainError::Interrupted { .. })), "{stops:?}");
        }
        let resumed =
            linearize_windows(&model, &recipe, &windows, dir.path(), true, &mut Silent).unwrap();
        assert_eq!(parameters(&resumed), parameters(&whole), "{stops:?}");
        assert_eq!(metrics(dir.path()), metrics(whole_dir.path()), "{stops:?}");
    }
}

#[test]
fn a_half_written_checkpoint_is_not_there() {
    let (model, windows, recipe) = (model(), windows(), recipe(&[]));
    let dir = tempfile::tempdir().unwrap();
    let stopped =
        linearize_windows(&model, &recipe, &windows, dir.path(), false, &mut StopAfter(4));
    assert!(matches!(stopped, Err(TrainError::Interrupted { stage: "transfer", step: 4, .. })));
    // What a kill leaves: a staging directory, and a line cut off in the log.
    let checkpoints = dir.path().join("checkpoints");
    let half = checkpoints.join(".saving-x1");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("parameters.safetensors"), b"half").unwrap();
    let log = dir.path().join("metrics.jsonl");
    let cut = std::fs::read_to_string(&log).unwrap() + "{\"stage\":\"trans";
    std::fs::write(&log, cut).unwrap();
    linearize_windows(&model, &recipe, &windows, dir.path(), true, &mut Silent).unwrap();
    assert_eq!(metrics(dir.path()).len(), 20);
}

#[test]
fn a_run_goes_on_only_with_what_it_began_with() {
    let (model, windows) = (model(), windows());
    let base = recipe(&[]);
    let dir = tempfile::tempdir().unwrap();
    let hint = |result: Result<Model, TrainError>| result.unwrap_err().hint().unwrap();
    let run = |recipe: &still_train::Recipe, windows: &Windows, resume| {
        linearize_windows(&model, recipe, windows, dir.path(), resume, &mut StopAfter(4))
    };
    assert!(hint(run(&base, &windows, true)).contains("without --resume"));
    assert!(matches!(run(&base, &windows, false), Err(TrainError::Interrupted { .. })));
    assert!(hint(run(&base, &windows, false)).contains("--resume"));
    let other = recipe(&["transfer.optimizer.lr=0.5"]);
    assert!(hint(run(&other, &windows, true)).contains("start a new run"));
    let fewer = Windows::from_windows(vec![vec![1; 48]], 5);
    assert!(hint(run(&base, &fewer, true)).contains("start a new run"));
    assert!(matches!(
        run(&base, &windows, true),
        Err(TrainError::Interrupted { stage, .. }) if stage == Stage::Transfer.name()
    ));
}

#[test]
fn old_checkpoints_are_dropped() {
    let (model, windows) = (model(), windows());
    let recipe = recipe(&["checkpoint.keep=2", "checkpoint.every=2"]);
    let dir = tempfile::tempdir().unwrap();
    linearize_windows(&model, &recipe, &windows, dir.path(), false, &mut Silent).unwrap();
    let checkpoints = dir.path().join("checkpoints");
    let left = || {
        let entries = checkpoints.read_dir().unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let kept = ["finetune-step-000008", "finetune-step-000010"];
    assert_eq!(left(), kept);
    // A kill between the last save and the dropping of what it replaces: there is no later save.
    std::fs::create_dir(checkpoints.join("finetune-step-000006")).unwrap();
    linearize_windows(&model, &recipe, &windows, dir.path(), true, &mut Silent).unwrap();
    assert_eq!(left(), kept);
}
