//! Known losses of every shipped recipe: its attention, objective and optimizers on a tiny model.
//!
//! `cargo test -p still-train --test recipe_curves -- --ignored` records them again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use still_model::Student;
use still_model::random::{random_model, tiny_config};
use still_train::{FinetuneStage, Position, Recipe, TransferStage, Windows};

/// Losses of the stages by name; a stage that a recipe leaves out has none.
type Curves = BTreeMap<String, Vec<f64>>;

/// A squared rounding error of f32 outputs: the loss of a student whose exact tokens are all that there are, as LoLA's are at first.
const ROUNDING: f64 = 1e-13;

/// Steps of each stage.
const STEPS: usize = 4;

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/recipe_curves.json")
}

/// Every recipe's file by its name under `recipes/`, such as `comparison/paper`.
fn files() -> BTreeMap<String, PathBuf> {
    fn add(dir: &Path, prefix: &str, files: &mut BTreeMap<String, PathBuf>) {
        for entry in dir.read_dir().unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{prefix}{}", path.file_stem().unwrap().to_str().unwrap());
            if path.is_dir() {
                add(&path, &format!("{name}/"), files);
            } else {
                files.insert(name, path);
            }
        }
    }
    let mut files = BTreeMap::new();
    add(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes"), "", &mut files);
    files
}

/// Every recipe by name, cut to the length and batch of a test. What decides a loss stays as it ships: attention, objective, rates.
fn recipes() -> BTreeMap<String, Recipe> {
    let recipes = files().into_iter().map(|(name, path)| {
        let mut overrides: Vec<String> = ["transfer", "finetune"]
            .iter()
            .flat_map(|stage| [format!("{stage}.batch=2"), format!("{stage}.optimizer.warmup=1")])
            .collect();
        let text = fs::read_to_string(&path).unwrap();
        let shipped = Recipe::parse(&text, &[]).unwrap();
        if shipped.calibration.cache_fraction.is_some() {
            // What a calibration may find; that it finds the same everywhere is not this test's business.
            overrides.push("attention.budgets=[[64, 4], [0, 2]]".into());
        }
        for (stage, steps) in
            [("transfer", shipped.transfer.steps), ("finetune", shipped.finetune.steps)]
        {
            overrides.push(format!("{stage}.steps={}", steps.min(STEPS)));
        }
        (name, Recipe::parse(&text, &overrides).unwrap())
    });
    recipes.collect()
}

/// The two stages of a recipe over windows long enough for chunks of 64 to retire.
fn curves(recipe: &Recipe) -> Curves {
    let model = random_model(tiny_config(), 11).unwrap();
    let window = |n: u32| (0..260).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect();
    let windows = Windows::from_windows((0..4).map(window).collect(), 5);
    let still = recipe.attention.resolve(model.config()).unwrap();
    let init = recipe.attention.init;
    let mut student = Student::init(still, model.config(), init, recipe.seed).unwrap();
    let mut position = Position::default();
    let mut all = Curves::new();
    if recipe.transfer.steps > 0 {
        let mut stage = TransferStage::new(&model, &student, &recipe.transfer).unwrap();
        let mut step = || stage.step(&windows.next(&mut position, 2)).unwrap().report.loss;
        all.insert("transfer".into(), (0..recipe.transfer.steps).map(|_| step()).collect());
        student = stage.student().unwrap();
    }
    let mut stage = FinetuneStage::new(&model, &student, &recipe.finetune, recipe.seed).unwrap();
    let mut step = || stage.step(&windows.next(&mut position, 2), None).unwrap().loss;
    all.insert("finetune".into(), (0..recipe.finetune.steps).map(|_| step()).collect());
    all
}

#[test]
fn every_recipe_learns_as_recorded() {
    let text = fs::read_to_string(here()).unwrap();
    let recorded: BTreeMap<String, Curves> = serde_json::from_str(&text).unwrap();
    let recipes = recipes();
    assert!(recorded.keys().eq(recipes.keys()), "a curve for each recipe: record them again");
    for (name, recipe) in &recipes {
        let (got, expected) = (curves(recipe), &recorded[name]);
        assert!(got.keys().eq(expected.keys()), "{name}: {got:?}");
        for (stage, expected) in expected {
            assert_eq!(got[stage].len(), expected.len(), "{name}, {stage}");
            for (step, (x, expected)) in got[stage].iter().zip(expected).enumerate() {
                let near = (x - expected).abs() <= 1e-4 * expected + ROUNDING;
                assert!(near, "{name}, {stage} step {step}: {x:e}, not {expected:e}");
            }
        }
    }
}

#[test]
#[ignore = "records what the other test expects"]
fn record() {
    let all: BTreeMap<String, Curves> =
        recipes().into_iter().map(|(name, recipe)| (name, curves(&recipe))).collect();
    fs::create_dir_all(here().parent().unwrap()).unwrap();
    fs::write(here(), serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
}
