//! Evaluations between steps, and what follows from them: the best student, early ends, spikes, lost runs.

mod common;

use std::path::Path;

use common::{StopAfter, model, parameters, recipe, windows};
use still_model::Model;
use still_train::{
    Evaluation, Observer, Recipe, Silent, StepReport, TrainError, Window, Windows,
    linearize_windows,
};

const EVALUATED: [&str; 4] = [
    "evaluation.every=4",
    "evaluation.windows=2",
    "evaluation.repeated_text=24",
    "evaluation.keep_best=true",
];

fn heldout() -> Vec<Window> {
    let ids = |n: u32| (0..48).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect::<Vec<_>>();
    (7..9).map(|n| ids(n).into()).collect()
}

fn run(recipe: &Recipe, dir: &Path, resume: bool) -> Result<Model, TrainError> {
    run_with(recipe, &windows(), dir, resume, &mut Silent)
}

fn run_with(
    recipe: &Recipe,
    windows: &Windows,
    dir: &Path,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Model, TrainError> {
    let windows = windows.clone().with_heldout(heldout());
    linearize_windows(&model(), recipe, &windows, dir, resume, observer)
}

/// Lines of a log, without the time that they took.
fn log<T: serde::de::DeserializeOwned>(dir: &Path, name: &str) -> Vec<T> {
    let text = std::fs::read_to_string(dir.join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn evaluations(dir: &Path) -> Vec<Evaluation> {
    let all: Vec<Evaluation> = log(dir, "evaluations.jsonl");
    all.into_iter().map(|evaluation| Evaluation { seconds: 0.0, ..evaluation }).collect()
}

#[test]
fn evaluations_are_made_when_the_recipe_says_and_resumed_exactly() {
    let set: Vec<&str> = EVALUATED.iter().copied().chain(["finetune.dropout=0.2"]).collect();
    let recipe = recipe(&set);
    let whole = tempfile::tempdir().unwrap();
    let student = run(&recipe, whole.path(), false).unwrap();
    let expected = evaluations(whole.path());
    let steps: Vec<(&str, usize)> =
        expected.iter().map(|line| (line.stage.name(), line.step)).collect();
    let (one, two) = ("transfer", "finetune");
    assert_eq!(
        steps,
        [(one, 0), (one, 4), (one, 8), (one, 10), (two, 4), (two, 8), (two, 10)],
        "before the first step, every 4, and at the end of each stage"
    );
    for line in &expected {
        assert!(line.heldout_nll.unwrap() > 0.0 && line.repeated_nll.unwrap() > 0.0);
        assert_eq!(line.passkey_recall, None);
    }
    assert!(whole.path().join("checkpoints/best/parameters.safetensors").exists());

    for stops in [vec![5], vec![3, 6, 4]] {
        let dir = tempfile::tempdir().unwrap();
        for (i, &after) in stops.iter().enumerate() {
            let stopped = run_with(&recipe, &windows(), dir.path(), i > 0, &mut StopAfter(after));
            assert!(matches!(stopped, Err(TrainError::Interrupted { .. })));
        }
        let resumed = run(&recipe, dir.path(), true).unwrap();
        assert_eq!(parameters(&resumed), parameters(&student), "{stops:?}");
        assert_eq!(evaluations(dir.path()), expected, "{stops:?}");
    }
}

#[test]
fn the_best_student_is_the_result() {
    let stage = [
        "evaluation.every=1",
        "evaluation.windows=2",
        "transfer.optimizer.lr=3.0",
        "transfer.optimizer.schedule=constant",
        "finetune.steps=0",
    ];
    let student_of = |more: &[&str]| {
        let set: Vec<&str> = stage.iter().chain(more).copied().collect();
        let dir = tempfile::tempdir().unwrap();
        let student = run(&recipe(&set), dir.path(), false).unwrap();
        (parameters(&student), evaluations(dir.path()), dir)
    };
    // Steps this long do as much harm as good: of a few runs, one is at its best before its end.
    let steps = [10, 9, 8, 7].map(|steps| format!("transfer.steps={steps}"));
    let (best, step) = steps
        .iter()
        .find_map(|steps| {
            let (student, lines, dir) = student_of(&[steps, "evaluation.keep_best=true"]);
            assert!(dir.path().join("checkpoints/best").exists());
            let lowest =
                lines.iter().map(|line| line.heldout_nll.unwrap()).fold(f64::MAX, f64::min);
            let best = lines.iter().rfind(|line| line.best).unwrap();
            assert_eq!(best.heldout_nll, Some(lowest));
            (best.step > 0 && best.step < lines.last()?.step).then_some((student, best.step))
        })
        .unwrap();
    // A run that ends there has the same student.
    let (ended, _, dir) = student_of(&[&format!("transfer.steps={step}")]);
    assert_eq!(best, ended);
    assert!(!dir.path().join("checkpoints/best").exists());
}

#[test]
fn a_stage_that_gets_no_better_ends_early_and_stays_ended() {
    let recipe = recipe(&[
        "evaluation.every=1",
        "evaluation.windows=2",
        "evaluation.early_stop=2",
        "guard.max_heldout_growth=0",
        "transfer.optimizer.lr=3.0",
        "transfer.steps=40",
        "finetune.steps=1",
    ]);
    let dir = tempfile::tempdir().unwrap();
    run(&recipe, dir.path(), false).unwrap();
    let transfer = |dir: &Path| {
        let steps: Vec<StepReport> = log(dir, "metrics.jsonl");
        steps.iter().filter(|step| step.stage.name() == "transfer").count()
    };
    let steps = transfer(dir.path());
    assert!((2..40).contains(&steps), "{steps}");
    // Resumed at its last checkpoint, it has nothing left to do.
    run(&recipe, dir.path(), true).unwrap();
    assert_eq!(transfer(dir.path()), steps);
}

#[test]
fn a_plateau_lowers_the_rate_and_a_resumed_run_remembers() {
    let set = [
        "evaluation.every=1",
        "evaluation.windows=1",
        "guard.max_heldout_growth=0",
        "transfer.optimizer.lr=1.0",
        "transfer.optimizer.schedule={ plateau = { factor = 0.5, patience = 0, cooldown = 1 } }",
        "finetune.steps=0",
    ];
    let rates = |dir: &Path| -> Vec<f64> {
        log::<StepReport>(dir, "metrics.jsonl").iter().map(|step| step.lr).collect()
    };
    let whole = tempfile::tempdir().unwrap();
    let student = run(&recipe(&set), whole.path(), false).unwrap();
    assert!(rates(whole.path())[9] < 1.0, "{:?}", rates(whole.path()));
    let dir = tempfile::tempdir().unwrap();
    run_with(&recipe(&set), &windows(), dir.path(), false, &mut StopAfter(6)).unwrap_err();
    let resumed = run(&recipe(&set), dir.path(), true).unwrap();
    assert_eq!(rates(dir.path()), rates(whole.path()));
    assert_eq!(parameters(&resumed), parameters(&student));
}

/// Windows of which a few give losses unlike the others'.
fn with_spikes() -> Windows {
    let calm = |n: u32| (0..48).map(|t| (t + n) % 4).collect();
    let wild = |n: u32| (0..48).map(|t| (t * t * 17 + 91 * t + n) % 256).collect();
    Windows::from_windows((0..12).map(|n| if n == 7 { wild(n) } else { calm(n) }).collect(), 5)
}

#[test]
fn spikes_are_skipped_counted_and_resumed_exactly() {
    let set =
        ["transfer.batch=1", "transfer.steps=24", "finetune.steps=0", "guard.spike_factor=1.5"];
    let whole = tempfile::tempdir().unwrap();
    let student =
        run_with(&recipe(&set), &with_spikes(), whole.path(), false, &mut Silent).unwrap();
    let steps: Vec<StepReport> = log(whole.path(), "metrics.jsonl");
    let skipped = steps.iter().filter(|step| step.skipped).count();
    assert!((1..12).contains(&skipped), "{skipped} of {}", steps.len());
    let dir = tempfile::tempdir().unwrap();
    for (resume, after) in [(false, 8), (true, 3), (true, 7)] {
        let mut stop = StopAfter(after);
        run_with(&recipe(&set), &with_spikes(), dir.path(), resume, &mut stop).unwrap_err();
    }
    let resumed = run_with(&recipe(&set), &with_spikes(), dir.path(), true, &mut Silent).unwrap();
    assert_eq!(log::<StepReport>(dir.path(), "metrics.jsonl"), steps);
    assert_eq!(parameters(&resumed), parameters(&student));
}

#[test]
fn a_run_that_gets_worse_stops_with_advice_after_saving() {
    let wild = [
        "evaluation.every=1",
        "evaluation.windows=2",
        "finetune.optimizer.lr=10.0",
        "guard.max_heldout_growth=1.0001",
        "transfer.steps=0",
        "guard.spike_factor=0",
    ];
    let dir = tempfile::tempdir().unwrap();
    let error = run(&recipe(&wild), dir.path(), false).unwrap_err();
    let TrainError::Diverged { path, .. } = &error else { panic!("{error}") };
    assert!(path.exists());
    assert!(error.to_string().contains("held-out loss rose"), "{error}");
    assert!(error.hint().unwrap().contains("finetune.optimizer.lr"));
}

#[test]
fn settings_without_what_they_go_by_are_refused() {
    let refused = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(|&item| item.to_owned()).collect();
        Recipe::parse("", &set).unwrap_err().to_string()
    };
    assert!(refused(&["evaluation.keep_best=true"]).contains("held-out loss"));
    assert!(refused(&["evaluation.early_stop=2"]).contains("held-out loss"));
    let plateau = "transfer.optimizer.schedule={ plateau = { factor = 0.5, patience = 1 } }";
    assert!(refused(&[plateau]).contains("transfer.optimizer.schedule"));
    assert!(refused(&["guard.spike_factor=0.5"]).contains("guard.spike_factor"));
    assert!(refused(&["finetune.dropout=1"]).contains("finetune.dropout"));
    assert!(refused(&["finetune.objective={ mixed = { kl = 2 } }"]).contains("mixed.kl"));
    assert!(refused(&["transfer.linear_branch_weight=-1"]).contains("linear_branch_weight"));
    // More held-out windows than there are.
    let dir = tempfile::tempdir().unwrap();
    let error = run(&recipe(&["evaluation.every=1", "evaluation.windows=3"]), dir.path(), false);
    assert!(error.unwrap_err().to_string().contains("2 held-out windows are there"));
}

#[test]
fn recall_is_measured_too() {
    let recipe = recipe(&[
        "evaluation.every=10",
        "evaluation.windows=0",
        "evaluation.passkey_keys=1",
        "evaluation.passkey_length=512",
        "transfer.steps=1",
        "finetune.steps=0",
    ]);
    let dir = tempfile::tempdir().unwrap();
    run(&recipe, dir.path(), false).unwrap();
    let lines = evaluations(dir.path());
    assert_eq!(lines.len(), 2, "before the first step and at the end");
    assert!(lines.iter().all(|line| line.passkey_recall == Some(0.0) && !line.best));
    let text = std::fs::read_to_string(dir.path().join("evaluations.jsonl")).unwrap();
    assert!(!text.contains("heldout_nll"), "what is not measured is not there: {text}");
}
