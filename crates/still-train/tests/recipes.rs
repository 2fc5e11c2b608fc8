//! The recipes that ship, and what a wrong one says.

mod common;

use std::io::Read;
use std::path::{Path, PathBuf};

use still_attention::{Branches, FeatureMap, LinearNorm, Mode, Router, RowDtype, SelectionHead};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Student};
use still_train::{
    AttentionRecipe, CalibrationRecipe, DataRecipe, Recipe, TokenCache, TrainError, Windows,
    linearize,
};

#[test]
fn every_shipped_recipe_parses_and_fits_a_model() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let files = |dir: &Path| -> Vec<PathBuf> {
        let paths = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.is_file()).collect()
    };
    let comparison = files(&dir.join("comparison"));
    assert_eq!(comparison.len(), COMPARED.len(), "a recipe for every recorded student, none more");
    let mut count = 0;
    for path in files(&dir).into_iter().chain(comparison) {
        let text = std::fs::read_to_string(&path).unwrap();
        let path = path.display();
        let recipe = Recipe::parse(&text, &[]).unwrap_or_else(|error| panic!("{path}: {error}"));
        let still = recipe.attention.resolve(&tiny_config());
        let still = still.unwrap_or_else(|error| panic!("{path}: {error}"));
        Student::init(still, &tiny_config(), recipe.attention.init, recipe.seed)
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        count += 1;
    }
    assert!(count >= 5 + COMPARED.len());
}

/// Recipes of benches/results/2026-11-25-h100/comparison.md: the file, the recorded evaluation of its student, and the student's name there.
const COMPARED: [(&str, &str, &str); 4] = [
    ("ten-of-64", "2026-11-25-h100/eval_long.json", "uniform10G"),
    ("paper", "2026-11-25-h100/eval_long.json", "paperG"),
    ("lolcats", "2026-11-25-epyc-2core/eval_baselines_perplexity.json", "lolcats"),
    ("window-only", "2026-11-25-epyc-2core/eval_baselines_perplexity.json", "window"),
];

/// What the files leave out is a default; a default that changes must not change what was compared.
#[test]
fn recipes_of_the_comparison_are_those_of_its_students() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    for (name, file, student) in COMPARED {
        let results: serde_json::Value =
            serde_json::from_str(&read(&format!("benches/results/{file}"))).unwrap();
        let models = std::iter::once(&results).chain(results["compare"].as_array().unwrap());
        let found = models.into_iter().find(|model| model["model"] == student);
        let recorded = found.unwrap_or_else(|| panic!("no {student} in {file}"))["recipe"].clone();
        let recorded: Recipe = serde_json::from_value(recorded).unwrap();
        let recipe = Recipe::parse(&read(&format!("recipes/comparison/{name}.toml")), &[]).unwrap();
        assert_eq!(recipe, recorded, "{name}");
    }
}

#[test]
fn quick_is_the_default_with_calibrated_budgets() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/quick.toml");
    let quick = Recipe::parse(&std::fs::read_to_string(path).unwrap(), &[]).unwrap();
    let mut expected = Recipe::default();
    expected.calibration.cache_fraction = Some(0.2);
    expected.calibration.tokens = 16_384;
    assert_eq!(quick, expected);
}

#[test]
fn a_resolved_recipe_reads_back() {
    let recipe = common::recipe(&["attention.cap=9"]);
    let text = toml::to_string_pretty(&recipe).unwrap();
    assert_eq!(Recipe::parse(&text, &[]).unwrap(), recipe);
}

fn complaint(text: &str, overrides: &[&str]) -> (String, String) {
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    let error = Recipe::parse(text, &overrides).unwrap_err();
    (error.to_string(), error.hint().unwrap())
}

#[test]
fn unknown_keys_name_the_nearest() {
    let (what, hint) = complaint("[transfer]\nstep = 3", &[]);
    assert_eq!(what, "recipe: unknown key \"transfer.step\"");
    assert_eq!(hint, "did you mean \"transfer.steps\"?");
    let (what, hint) = complaint("", &["finetune.lora.ranks=4"]);
    assert_eq!(what, "recipe: unknown key \"finetune.lora.ranks\"");
    assert_eq!(hint, "did you mean \"finetune.lora.rank\"?");
    let (what, _) = complaint("[atention]\nchunk = 3", &[]);
    assert!(what.contains("atention"), "{what}");
}

#[test]
fn overrides_win_and_take_any_toml_value() {
    let set = |item: &str| Recipe::parse("seed = 1", &[item.to_owned()]).unwrap();
    assert_eq!(set("seed=7").seed, 7);
    assert_eq!(set("attention.router=none").attention.router, still_attention::Router::None);
    let random = set("attention.router={ random = { seed = 4 } }").attention.router;
    assert_eq!(random, still_attention::Router::Random { seed: 4 });
    assert_eq!(set("attention.budgets=[[1, 2]]").attention.budgets, Some(vec![vec![1, 2]]));
}

#[test]
fn what_a_section_leaves_out_is_its_own_default() {
    let recipe = Recipe::parse("[transfer.optimizer]\nwarmup = 9", &[]).unwrap();
    let default = Recipe::default().transfer.optimizer;
    assert_eq!((recipe.transfer.optimizer.lr, default.lr), (3e-2, 3e-2));
    assert_eq!(recipe.transfer.optimizer.warmup, 9);
    let set = ["finetune.lora.rank=3", "attention.feature_map=softmax"].map(str::to_owned);
    let recipe = Recipe::parse("", &set).unwrap();
    assert_eq!((recipe.finetune.lora.rank, recipe.finetune.lora.alpha), (3, 16.0));
    assert_eq!(recipe.attention.feature_map, still_attention::FeatureMap::Softmax);
}

#[test]
fn values_without_sense_are_refused() {
    for (item, word) in [
        ("transfer.batch=0", "transfer.batch is 0"),
        ("finetune.optimizer.lr=-1", "finetune.optimizer.lr is -1"),
        ("data.min_length=1", "min_length"),
        ("data.lengths=[512, 32]", "data.lengths [512, 32]"),
        ("data.lengths=[32, 512]", "data.length 32 and data.min_length 64"),
        ("data.length_weights=[1, 2]", "data.length_weights has 2 values, data.lengths 0"),
        ("data.length_steps=[10]", "data.length_steps has 1 values"),
        ("data.weights=[1, 0]", "data.weights has 0"),
        ("data.heldout=1", "data.heldout is 1"),
        ("data.heldout=-0.1", "data.heldout is -0.1"),
        ("data={ heldout = 0.1, heldout_windows = 0 }", "heldout_windows is 0"),
        ("data.loss_on=questions", "questions"),
        ("data.text_field=", "text_field is empty"),
        ("attention.router=best", "best"),
        ("attention.mode=linear", "linear"),
        ("seed", "cannot read the override"),
        ("transfer.loss_scale=0", "transfer.loss_scale is 0"),
        ("transfer.loss_scale=inf", "transfer.loss_scale is inf"),
        ("transfer.reduction=max", "max"),
        ("transfer.optimizer.clip=-1", "transfer.optimizer.clip is -1"),
        ("transfer.optimizer.clip=inf", "transfer.optimizer.clip is inf"),
        ("finetune.lora.targets=[\"q\", \"g\"]", "attention.gate leaves out"),
        (
            "transfer.optimizer.schedule={ plateau = { factor = 0.1, patience = 2, threshold = 1.0 } }",
            "schedule.plateau.threshold is 1",
        ),
    ] {
        let (what, hint) = complaint("", &[item]);
        assert!(what.contains(word), "{item}: {what}");
        assert!(!hint.is_empty());
    }
}

/// Whatever its kind, a number out of range is told with its key, its origin and the range.
#[test]
fn numbers_out_of_range_are_told_with_their_range() {
    for (item, what, hint) in [
        ("attention.chunk=1000000000000", "attention.chunk is 1000000000000", "from 1 to 65536"),
        ("attention.chunk=9223372036854775807", "is 9223372036854775807", "from 1 to 65536"),
        ("attention.chunk=-64", "attention.chunk is -64", "from 1 to 65536"),
        ("attention.budgets=[[2, 70000]]", "attention.budgets has 70000", "from 0 to 65536"),
        ("attention.feature_dim=10000000", "attention.feature_dim is 10000000", "from 1 to 4096"),
        ("transfer.batch=1000000000000", "transfer.batch is 1000000000000", "from 1 to 65536"),
        ("transfer.batch=1e12", "transfer.batch is 1e12", "a whole number from 1 to 65536"),
        ("transfer.batch=many", "transfer.batch is \"many\"", "a whole number"),
        ("data.length=1e6", "data.length is 1e6", "a whole number from 2 to 16777216"),
        ("finetune.optimizer.lr=nan", "lr is nan", "above 0"),
        ("finetune.optimizer.lr=inf", "lr is inf", "at most 1000"),
        ("finetune.optimizer.beta2=1", "beta2 is 1", "up to, but not, 1"),
        ("finetune.optimizer.clip=inf", "clip is inf", "from 0 to 1e30"),
        ("finetune.objective={ mixed = { kl = 1.5 } }", "mixed.kl is 1.5", "from 0 to 1"),
        ("finetune.lora={ rank = 1000000000 }", "finetune.lora.rank is 1000000000", "65536"),
        (
            "transfer.optimizer.schedule={ plateau = { factor = 1, patience = 2 } }",
            "factor is 1",
            "between 0 and 1",
        ),
        ("transfer.steps=-1", "transfer.steps is -1", "from 0 to"),
        ("checkpoint.keep=0", "checkpoint.keep is 0", "from 1 to"),
        ("evaluation.passkey_length=0", "passkey_length is 0", "from 1 to"),
        ("seed=-1", "seed is -1", "from 0 to 2⁶³ − 1"),
    ] {
        let (said, advice) = complaint("", &[item]);
        assert!(said.contains(what) && said.ends_with(" (--set)"), "{item}: {said}");
        assert!(advice.contains(hint), "{item}: {advice}");
    }
    let path = tempfile::tempdir().unwrap();
    let path = path.path().join("long.toml");
    let read = |text: &str, set: &[String]| {
        std::fs::write(&path, text).unwrap();
        Recipe::read(Some(&path), set).map_err(|error| error.to_string())
    };
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let said = read("[transfer]\nbatch = 0", &[]).unwrap_err();
    assert_eq!(said, format!("recipe: transfer.batch is 0 ({})", path.display()));
    assert_eq!(
        read("[transfer]\nbatch = 0", &["transfer.batch=2".into()]).unwrap().transfer.batch,
        2
    );
    assert!(read("[transfer", &[]).unwrap_err().contains("long.toml"));
    assert!(read(&" ".repeat(17 << 20), &[]).unwrap_err().contains("longer than 16 MiB"));
    // A recipe that was never parsed.
    let mut recipe = Recipe::default();
    recipe.finetune.dropout = f64::NAN;
    assert!(recipe.validate().unwrap_err().to_string().contains("finetune.dropout is nan"));
}

#[test]
fn nesting_without_end_is_refused() {
    let deep =
        |open: &str, close: &str| format!("{}{}", open.repeat(100_000), close.repeat(100_000));
    for text in [
        format!("seed = {}", deep("[", "]")),
        format!("seed = {}", deep("{ a = ", "}")),
        format!("{}b = 1", "a.".repeat(100_000)),
        format!("[{}b]", "a.".repeat(100_000)),
    ] {
        let (what, _) = complaint(&text, &[]);
        assert!(what.len() < 2000, "{} bytes", what.len());
    }
    let (what, _) = complaint("", &[&format!("{}b=1", "a.".repeat(100_000))]);
    assert!(what.contains("cannot read the override") && what.len() < 200, "{what}");
    let (what, _) = complaint("", &[&format!("seed={}", deep("[", "]"))]);
    assert!(what.contains("seed is ") && what.len() < 200, "{what}");
}

#[test]
fn data_that_cannot_be_trained_on() {
    let model = random_model(tiny_config(), 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let cache = TokenCache::at(dir.path().join("tokens"));
    let read = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = Windows::read(&[path], &model.tokenizer, &DataRecipe::default(), 0, &cache)
            .unwrap_err();
        assert!(error.hint().is_some());
        error.to_string()
    };
    assert!(read("empty.txt", b"").contains("too little text"));
    assert!(read("tiny.txt", b"a few words").contains("11 tokens"));
    assert!(read("latin1.txt", b"caf\xe9").contains("byte 3"));
    assert!(read("text.pdf", b"").contains("unknown kind"));
    assert!(read("a.jsonl", b"{\"text\": \"x\"}\n{\"txt\": 1}\n").contains("line 2"));
    assert!(read("a.jsonl.zst", b"not zstd").contains("a.jsonl.zst"));
    assert!(read("latin1.jsonl", b"{\"text\": \"x\"}\n{\"text\": \"caf\xe9\"}").contains("line 2"));
    assert!(read("word.txt", &b"x".repeat(5 << 20)).contains("data.max_word_bytes"));
    let line = format!("{{\"text\": \"a {}\"}}", "x".repeat(5 << 20));
    assert!(read("word.jsonl", line.as_bytes()).contains("line 1: no two words in more than"));
    let said = "y".repeat(5 << 20);
    let chat = format!("\n{{\"messages\": [{{\"role\": \"user\", \"content\": \"{said}\"}}]}}\n");
    assert!(read("long.jsonl", chat.as_bytes()).contains("line 2: a conversation of"));
    // Ten gigabytes in a few kilobytes would do as well: what is beyond the limit is never read.
    let bomb = zstd::encode_all(std::io::repeat(b' ').take(65 << 20), 1).unwrap();
    assert!(bomb.len() < 1 << 16);
    assert!(read("bomb.jsonl.zst", &bomb).contains("line 1 is longer than 67108864 bytes"));

    let missing = vec![dir.path().join("missing.txt")];
    let run = linearize(
        &model,
        &Recipe::default(),
        &missing,
        &dir.path().join("run"),
        false,
        &mut still_train::Silent,
    );
    assert!(matches!(run, Err(TrainError::Io { .. })));
}

#[test]
fn documents_never_share_a_window() {
    let model = random_model(tiny_config(), 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let line = |c: &str, n: usize| format!("{{\"text\": \"{}\"}}\n", c.repeat(n));
    std::fs::write(&path, line("a", 25) + &line("b", 3) + &line("c", 14)).unwrap();
    let recipe = DataRecipe { length: 10, min_length: 4, ..DataRecipe::default() };
    let cache = TokenCache::at(dir.path());
    let windows = Windows::read(&[path], &model.tokenizer, &recipe, 1, &cache).unwrap();
    assert_eq!((windows.len(), windows.documents, windows.tokens), (5, 2, 39));
    let mut position = still_train::Position::default();
    let mut lengths: Vec<usize> = windows
        .next(&mut position, 5)
        .into_iter()
        .map(|window| {
            assert!(window.ids().iter().all(|id| *id == window.ids()[0]));
            window.len()
        })
        .collect();
    lengths.sort_unstable();
    assert_eq!(lengths, [4, 5, 10, 10, 10]);
}

#[test]
fn every_epoch_reads_everything_in_another_order() {
    let windows = Windows::from_windows((0..20).map(|i| vec![i; 4]).collect(), 9);
    let mut position = still_train::Position::default();
    let mut epoch = || -> Vec<u32> {
        windows.next(&mut position, 20).into_iter().map(|window| window.ids()[0]).collect()
    };
    let (first, second) = (epoch(), epoch());
    assert_ne!(first, second);
    for mut order in [first, second] {
        order.sort_unstable();
        assert_eq!(order, (0..20).collect::<Vec<_>>());
    }
}

/// With every key given. Fields are listed one by one, so that a new one must be given here too.
#[test]
fn every_key_of_the_attention_and_its_calibration_is_known() {
    let attention = AttentionRecipe {
        mode: Mode::Hybrid,
        chunk: 8,
        budget: 2,
        budgets: Some(vec![vec![1, 2], vec![3, 4]]),
        cap: Some(100),
        router: Router::Random { seed: 5 },
        selection_head: SelectionHead::KvHead,
        feature_map: FeatureMap::Softmax,
        feature_dim: Some(8),
        init: FeatureInit::Normal,
        linear_norm: LinearNorm::Sum,
        gate: true,
        window_factor: true,
        branches: Branches { window: true, salient: true, linear: false },
        rows: Some(RowDtype::Int4),
        key_exponents: vec![vec!["0 2 -1".parse().unwrap(); 2]],
    };
    let calibration =
        CalibrationRecipe { cache_fraction: Some(0.3), at_length: 4096, tokens: 1000, window: 500 };
    let recipe = Recipe { attention, calibration, ..Recipe::default() };
    let text = toml::to_string(&recipe).unwrap();
    assert_eq!(Recipe::parse(&text, &[]).unwrap(), recipe, "{text}");
    let set = ["attention.rows=int8".to_owned(), "calibration.cache_fraction=0.1".to_owned()];
    let set = Recipe::parse(&text, &set).unwrap();
    assert_eq!(set.attention.rows, Some(RowDtype::Int8));
    assert!(
        Recipe::parse("[attention]\nrow = \"int8\"", &[]).unwrap_err().to_string().contains("row")
    );
}
