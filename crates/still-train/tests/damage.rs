//! What a run left on the disk and was damaged there is noticed before the run goes on.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{StopAfter, model, parameters, recipe, windows};
use serde_json::{Value, json};
use still_model::Model;
use still_train::{
    Observer, Recipe, Silent, TokenCache, TrainError, calibrated_recipe, linearize_windows,
};

/// A run that stopped in its second stage, after evaluations.
fn stopped(dir: &Path) -> PathBuf {
    let stopped =
        linearize_windows(&model(), &options(), &windows(), dir, false, &mut StopAfter(14));
    assert!(matches!(stopped, Err(TrainError::Interrupted { .. })), "{stopped:?}");
    dir.join("checkpoints/finetune-step-000004")
}

fn options() -> Recipe {
    recipe(&["evaluation.every=2", "evaluation.windows=0", "evaluation.repeated_text=16"])
}

fn resume(dir: &Path) -> Result<Model, TrainError> {
    linearize_windows(&model(), &options(), &windows(), dir, true, &mut Silent)
}

#[test]
fn a_run_goes_on_from_what_it_saved_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = stopped(dir.path());
    let mut files: Vec<PathBuf> =
        checkpoint.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 3);
    files.extend(["metrics.jsonl", "evaluations.jsonl"].map(|name| dir.path().join(name)));
    for file in files {
        let whole = fs::read(&file).unwrap();
        let bits = (0..40).map(|n| n * whole.len() / 40 * 8 + n % 8);
        for bit in (0..9 * 8).chain(bits) {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&file, bytes).unwrap();
            let error = resume(dir.path()).expect_err("it goes on");
            let said = error.to_string();
            assert!(matches!(error, TrainError::Run { .. }), "{said}");
            assert!(said.contains(file.to_str().unwrap()) && said.contains("damaged"), "{said}");
            let hint = error.hint().unwrap();
            assert!(hint.contains("go on"), "{hint}");
        }
        for cut in [0, 7, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..cut]).unwrap();
            let said = resume(dir.path()).expect_err("it goes on").to_string();
            assert!(said.contains("damaged"), "{said}");
        }
        fs::write(&file, &whole).unwrap();
    }
    // What the hint says helps: without its log, and from the checkpoint before.
    fs::write(dir.path().join("evaluations.jsonl"), "x").unwrap();
    fs::remove_file(dir.path().join("evaluations.jsonl")).unwrap();
    fs::write(checkpoint.join("trainer.json"), "x").unwrap();
    fs::remove_dir_all(&checkpoint).unwrap();
    let resumed = resume(dir.path()).unwrap();
    let whole_dir = tempfile::tempdir().unwrap();
    let whole =
        linearize_windows(&model(), &options(), &windows(), whole_dir.path(), false, &mut Silent);
    assert_eq!(parameters(&resumed), parameters(&whole.unwrap()));
}

/// Rewrites the progress of a checkpoint.
fn edit(checkpoint: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = checkpoint.join("trainer.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(json.as_object_mut().unwrap());
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn older_checkpoints_go_on_and_newer_ones_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = stopped(dir.path());
    edit(&checkpoint, |fields| {
        fields.insert("format".into(), json!(2));
        fields.remove("blake3");
        let blank = still_model::seal::BLANK;
        fields.insert("blake3".into(), json!(blank));
    });
    let path = checkpoint.join("trainer.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, still_model::seal::sealed_json(text)).unwrap();
    let said = resume(dir.path()).unwrap_err().to_string();
    assert!(said.contains("newer version"), "{said}");
    // As it was before checkpoints had a format: no digests, and no word of the logs.
    edit(&checkpoint, |fields| {
        fields.remove("format");
        fields.remove("blake3");
        fields.remove("logs");
    });
    for file in ["parameters.safetensors", "optimizer.safetensors"] {
        let path = checkpoint.join(file);
        let tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
        candle_core::safetensors::save(&tensors, &path).unwrap();
    }
    resume(dir.path()).unwrap();
}

/// Counts the tokens that calibration passes.
#[derive(Default)]
struct Calibrations(usize);

impl Observer for Calibrations {
    fn on_calibration(&mut self, _phase: still_train::Phase, tokens: usize, _of: usize) {
        self.0 += tokens;
    }
}

#[test]
fn budgets_are_of_their_own_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let cache = TokenCache::at(dir.path().join("tokens"));
    let base = dir.path().join("base");
    let saved = |seed: u64| {
        let model = still_model::random::random_model(still_model::random::tiny_config(), seed);
        still_model::random::save_base(&base, &model.unwrap(), candle_core::DType::F32).unwrap();
        Model::load(base.to_str().unwrap()).unwrap()
    };
    let model = saved(11);
    let text = |name: &str, word: &str| {
        let path = dir.path().join(name);
        fs::write(&path, format!("{word} wind and sea; ").repeat(400)).unwrap();
        vec![path]
    };
    let (first, second) = (text("a.txt", "north"), text("b.txt", "south"));
    let options = [
        "calibration.cache_fraction=0.6",
        "calibration.at_length=512",
        "calibration.tokens=256",
        "calibration.window=128",
    ];
    let calibrated = |model: &Model, data: &[PathBuf], more: &[&str]| {
        let recipe = recipe(&[&options, more].concat());
        let mut observer = Calibrations::default();
        let found = calibrated_recipe(model, &recipe, data, &cache, &run, &mut observer).unwrap();
        (observer.0 > 0, found.attention.budgets.unwrap())
    };
    let (anew, budgets) = calibrated(&model, &first, &[]);
    assert!(anew);
    assert_eq!(calibrated(&model, &first, &[]), (false, budgets.clone()), "it is known");

    // Whatever decides them.
    for more in [
        "seed=4",
        "calibration.tokens=384",
        "calibration.window=96",
        "calibration.at_length=640",
        "calibration.cache_fraction=0.7",
        "attention.linear_norm=sum",
    ] {
        assert!(calibrated(&model, &first, &[more]).0, "{more}");
        assert!(!calibrated(&model, &first, &[more]).0, "{more}");
    }
    assert!(calibrated(&model, &second, &[]).0, "other data");
    assert!(calibrated(&saved(12), &second, &[]).0, "another model");
    assert_eq!(calibrated(&saved(11), &first, &[]), (true, budgets.clone()));

    // Budgets that were changed, and files that are none.
    let path = run.join("budgets.json");
    let whole = fs::read_to_string(&path).unwrap();
    let mut json: Value = serde_json::from_str(&whole).unwrap();
    json["budgets"][0][0] = json!(json["budgets"][0][0].as_u64().unwrap() ^ 1);
    for text in [json.to_string(), String::new(), whole.replace("fingerprint", "fingerprinu")] {
        fs::write(&path, text).unwrap();
        assert_eq!(calibrated(&model, &first, &[]), (true, budgets.clone()));
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }
}
