//! `still linearize` on a small random model: both stages, exports, interruption.

use std::fs;
use std::path::Path;

use crate::common::{Outcome, linearize_args, still, teacher_dir, words};

const SHORT: [&str; 10] = [
    "--set",
    "data.length=128",
    "--set",
    "transfer.steps=3",
    "--set",
    "finetune.steps=2",
    "--set",
    "checkpoint.every=1",
    "--set",
    "attention.budget=8",
];

fn linearize(dir: &Path, out: &str, extra: &[&str]) -> Outcome {
    let data = dir.join("data.txt");
    fs::write(&data, words(2000)).unwrap();
    Outcome::of(
        still()
            .env("STILL_CACHE", dir.join("cache"))
            .args(linearize_args(teacher_dir(), &data, &dir.join(out)))
            .args(SHORT)
            .args(extra),
    )
}

fn greedy(model: &Path) -> String {
    let outcome = Outcome::of(
        still()
            .args(["generate", "--max-new-tokens", "8", "--prompt", "The sea", "--model"])
            .arg(model),
    );
    outcome.succeeded();
    outcome.stdout
}

#[test]
fn full_and_delta_students_write_the_same_text() {
    let dir = tempfile::tempdir().unwrap();
    let full = linearize(dir.path(), "full", &["--json"]);
    full.succeeded();
    let report = full.json();
    assert_eq!(report["stages"][0]["stage"], "transfer");
    assert_eq!(report["stages"][0]["steps"], 3);
    assert_eq!(report["stages"][1]["steps"], 2);
    linearize(dir.path(), "delta", &["--delta"]).succeeded();
    assert_eq!(greedy(&dir.path().join("full")), greedy(&dir.path().join("delta")));

    let config = fs::read_to_string(dir.path().join("full/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["still"]["budgets"][0][0], 8);
    assert_eq!(config["still_recipe"]["transfer"]["steps"], 3);
    assert!(dir.path().join("full.run/metrics.jsonl").exists());
}

/// Where a log is kept instead of a terminal: a line at every checkpoint, no bar, no colors; the layers at the end.
#[test]
fn progress_is_readable_in_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = linearize(dir.path(), "student", &[]);
    outcome.succeeded();
    assert!(outcome.stdout.is_empty(), "{}", outcome.stdout);
    let stderr = &outcome.stderr;
    assert!(!stderr.contains(['\u{1b}', '\r']), "{stderr:?}");
    let told: Vec<&str> = stderr.lines().filter(|line| line.contains("checkpoint saved")).collect();
    assert_eq!(told.len(), 5, "{stderr}");
    for (line, place) in told.iter().zip(["transfer 1/3", "transfer 2/3", "transfer 3/3"]) {
        assert!(line.starts_with(&format!("    Training {place} steps, loss ")), "{line}");
        assert!(line.contains(" tokens/s, ") && line.contains(" left, "), "{line}");
    }
    assert!(told[4].contains("finetune 2/2 steps, loss "), "{stderr}");
    let table: Vec<&str> =
        stderr.lines().skip_while(|line| !line.starts_with("transfer: layer")).collect();
    assert!(table[0].ends_with("first loss  last loss  ratio"), "{stderr}");
    assert!(table[2].starts_with("0 ") && table[3].starts_with("1 "), "{stderr}");
    assert!(stderr.contains("still report run"), "{stderr}");

    let quiet = linearize(dir.path(), "quiet", &["--quiet"]);
    quiet.succeeded();
    assert!(quiet.stderr.is_empty(), "{}", quiet.stderr);
}

/// A run that goes on tells first losses from its log, not from where it went on.
#[test]
fn losses_of_layers_are_of_the_whole_run() {
    let dir = tempfile::tempdir().unwrap();
    let whole = linearize(dir.path(), "student", &["--json"]);
    whole.succeeded();
    let layers = whole.json()["layers"].clone();
    assert_eq!(layers.as_array().unwrap().len(), 2);
    for (n, layer) in layers.as_array().unwrap().iter().enumerate() {
        let loss = |key: &str| layer[key].as_f64().unwrap();
        assert_eq!(layer["layer"], n);
        assert!(loss("first_loss") > 0.0);
        // JSON is read back to the last digit but one.
        let ratio = loss("last_loss") / loss("first_loss");
        assert!((loss("ratio") / ratio - 1.0).abs() < 1e-12);
    }
    let again = linearize(dir.path(), "student", &["--json", "--overwrite", "--resume"]);
    again.succeeded();
    assert_eq!(again.json()["layers"], layers);
}

#[test]
fn the_data_is_counted_and_tokenized_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = linearize(dir.path(), "first", &[]);
    first.succeeded();
    let line = first.stderr.lines().find(|line| line.contains(" Data ")).unwrap();
    assert!(line.contains("tokens in 1 document: ") && line.contains("windows of 128"), "{line}");
    let plan = first.stderr.lines().find(|line| line.contains(" Plan ")).unwrap();
    assert!(plan.ends_with(" epochs of it"), "{plan}");
    assert_eq!(dir.path().join("cache/tokens").read_dir().unwrap().count(), 1);
}

/// Two files with weights, mixed lengths, packed, something held out; and the cache given as data.
#[test]
fn data_of_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    let chat = r#"{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]}"#;
    let chats = dir.path().join("chats.jsonl");
    fs::write(&chats, format!("{chat}\n").repeat(50)).unwrap();
    let sets = [
        "data.lengths=[64, 256]",
        "data.weights=[1, 3]",
        "data.pack=true",
        "data.min_length=8",
        "data.loss_on=answers",
    ];
    let mut extra = vec!["--data", chats.to_str().unwrap()];
    sets.iter().for_each(|set| extra.extend(["--set", set]));
    let mixed = linearize(dir.path(), "mixed", &extra);
    mixed.succeeded();
    assert!(
        mixed.stderr.contains(" of 64, ") && mixed.stderr.contains("packed"),
        "{}",
        mixed.stderr
    );

    linearize(dir.path(), "plain", &[]).succeeded();
    let cached = dir.path().join("cache/tokens").read_dir().unwrap();
    let cached: Vec<_> = cached.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(cached.len(), 3);
    let mut extra = vec!["--data", cached[0].to_str().unwrap()];
    sets.iter().for_each(|set| extra.extend(["--set", set]));
    linearize(dir.path(), "tokens", &extra).succeeded();
}

#[test]
fn a_finished_run_is_not_overwritten_unless_asked() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), "student", &[]).succeeded();
    linearize(dir.path(), "student", &[]).failed_with("exists already");
    // The run directory is the first run's, too.
    linearize(dir.path(), "student", &["--overwrite"]).failed_with("earlier run");
    linearize(dir.path(), "student", &["--overwrite", "--resume"]).succeeded();
}

#[test]
fn resume_needs_a_run_of_the_same_recipe() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), "student", &["--resume"]).failed_with("resume");
    linearize(dir.path(), "student", &[]).succeeded();
    linearize(dir.path(), "student", &["--overwrite", "--resume", "--set", "transfer.batch=2"])
        .failed_with("another recipe");
}

/// Ctrl-C saves, says how to go on, and leaves no student behind; the resumed run ends as an uninterrupted one.
#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on() {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, words(2000)).unwrap();
    let command = |out: &str| {
        let mut command = Command::new(crate::common::BINARY);
        command.args(linearize_args(teacher_dir(), &data, &dir.path().join(out))).args(SHORT);
        command.args(["--set", "transfer.steps=200"]).stderr(Stdio::piped());
        command.env("STILL_CACHE", dir.path().join("cache"));
        command
    };
    let child = command("cut").spawn().unwrap();
    // Any checkpoint will do; old ones are dropped as the run goes on.
    let checkpoints = dir.path().join("cut.run/checkpoints");
    let saved = || {
        let entries = checkpoints.read_dir().ok()?;
        let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
        names.find(|name| name.to_string_lossy().starts_with("transfer-step"))
    };
    let patience = Instant::now();
    while saved().is_none() && patience.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    let interrupted =
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("stopped at") && stderr.contains("--resume"), "{stderr}");
    assert!(!dir.path().join("cut").exists());

    assert!(command("cut").arg("--resume").output().unwrap().status.success());
    assert!(command("whole").output().unwrap().status.success());
    let weights = |out: &str| fs::read(dir.path().join(out).join("model.safetensors")).unwrap();
    assert!(
        weights("cut") == weights("whole"),
        "the resumed run differs from the uninterrupted one"
    );
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plan = linearize(dir.path(), "student", &["--dry-run", "--json"]);
    plan.succeeded();
    let plan = plan.json();
    let stage = |n: usize| &plan["stages"][n];
    assert_eq!(stage(0)["stage"], "transfer");
    assert_eq!(stage(0)["steps"], 3);
    assert_eq!(stage(0)["tokens"], 3 * 128);
    // Two layers: feature maps of four query heads and two selection heads, 8 × 8 each, and four ℓ.
    assert_eq!(stage(0)["parameters"], 2 * (6 * 64 + 4));
    assert_eq!(stage(1)["tokens"], 2 * 128);
    for number in ["peak_bytes", "seconds", "tokens_per_s"] {
        assert!(stage(1)[number].as_f64().unwrap() > 0.0, "{number}");
    }
    assert!(plan["peak_bytes"].as_u64() > plan["weights_bytes"].as_u64());
    let table = linearize(dir.path(), "student", &["--dry-run"]);
    table.succeeded();
    assert!(table.stdout.contains("finetune") && table.stdout.contains("peak memory"));
    assert!(table.stderr.contains("counted from shapes"), "{}", table.stderr);
    for left in ["student", "student.run"] {
        assert!(!dir.path().join(left).exists(), "{left} was written");
    }
}

/// A merged student and a delta of one and the same run are one model, dropout or not.
#[test]
fn exports_agree_after_dropout_and_evaluations() {
    let dir = tempfile::tempdir().unwrap();
    let options = [
        "finetune.dropout=0.2",
        "finetune.objective={ mixed = { kl = 0.5 } }",
        "transfer.linear_branch_weight=0.1",
        "evaluation.every=2",
        "evaluation.windows=0",
        "evaluation.repeated_text=32",
    ];
    let set: Vec<&str> = options.iter().flat_map(|option| ["--set", option]).collect();
    let full = linearize(dir.path(), "full", &set);
    full.succeeded();
    // Each is told while the run goes on.
    assert_eq!(full.stderr.matches("repeated-text loss").count(), 4, "{}", full.stderr);
    let delta: Vec<&str> = set.iter().copied().chain(["--delta"]).collect();
    linearize(dir.path(), "delta", &delta).succeeded();
    assert_eq!(greedy(&dir.path().join("full")), greedy(&dir.path().join("delta")));
    let log = fs::read_to_string(dir.path().join("full.run/evaluations.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "before the first step, step 2 and 3, and step 2: {log}");
    assert!(lines.iter().all(|line| line["repeated_nll"].is_f64()));
}

/// A run of few tokens ends with a verdict: in the terminal, in the run's directory, in JSON and in its report.
#[test]
fn a_finished_run_is_judged() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, words(2000)).unwrap();
    let command = |more: &[&str]| {
        let args = linearize_args(teacher_dir(), &data, &dir.path().join("student"));
        let judged = args.into_iter().filter(|word| word != "--no-verdict");
        let mut command = still();
        command.env("STILL_CACHE", dir.path().join("cache")).args(judged).args(SHORT).args(more);
        Outcome::of(&mut command)
    };
    let outcome = command(&["--json"]);
    outcome.succeeded();
    let verdict = &outcome.json()["verdict"];
    let rows = verdict["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["model"].as_str().unwrap()).collect();
    assert_eq!(names, ["teacher", "untrained", "trained"]);
    for (n, row) in rows.iter().enumerate() {
        for key in ["perplexity", "repeated_nll", "cache_bytes", "decode_tokens_per_s"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
        assert_eq!(row["recall"][0]["what"], "pass keys");
        let ratio = &row["perplexity_ratio"];
        let end = |key: &str| ratio[key].as_f64().unwrap();
        assert!(
            n == 0 && ratio.is_null() || end("low") <= end("mean") && end("mean") <= end("high")
        );
    }
    assert_eq!(verdict["samples"].as_array().unwrap().len(), 2);
    let sentence = verdict["sentence"].as_str().unwrap();
    let told = outcome.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(told.contains(sentence), "{}", outcome.stderr);
    assert!(told.contains("Held out: ") && told.contains("still chat --model"), "{told}");

    let run_dir = dir.path().join("student.run");
    let report = Outcome::of(still().args(["report", "run"]).arg(&run_dir));
    report.succeeded();
    let page = fs::read_to_string(run_dir.join("report.html")).unwrap();
    assert!(page.contains("<h2>Verdict</h2>") && page.contains("held-out perplexity"));
    assert!(report.stdout.contains("held-out perplexity"), "{}", report.stdout);

    // Without one, that of the student before is gone.
    let again = command(&["--overwrite", "--resume", "--no-verdict", "--json"]);
    again.succeeded();
    assert!(again.json()["verdict"].is_null());
    assert!(!run_dir.join("verdict.json").exists());
}

/// Text that the run held out is what its student is judged on.
#[test]
fn a_verdict_reads_what_the_run_held_out() {
    let dir = tempfile::tempdir().unwrap();
    let (data, heldout) = (dir.path().join("data.txt"), dir.path().join("heldout.txt"));
    fs::write(&data, words(2000)).unwrap();
    fs::write(&heldout, words(900)).unwrap();
    let set = format!("data.heldout_files=[{:?}]", heldout.to_str().unwrap());
    let args = linearize_args(teacher_dir(), &data, &dir.path().join("student"));
    let judged = args.into_iter().filter(|word| word != "--no-verdict");
    let mut command = still();
    command.env("STILL_CACHE", dir.path().join("cache")).args(judged).args(SHORT);
    let outcome = Outcome::of(command.args(["--json", "--set", &set]));
    outcome.succeeded();
    let heldout = outcome.json()["verdict"]["heldout"].as_str().unwrap().to_owned();
    assert!(heldout.contains("windows of the run's data"), "{heldout}");
}

#[test]
fn without_training_a_student_has_calibrated_budgets() {
    let dir = tempfile::tempdir().unwrap();
    let calibration =
        ["calibration.at_length=4096", "calibration.window=512", "attention.rows=int8"];
    let set: Vec<&str> = calibration.iter().flat_map(|key| ["--set", key]).collect();
    let free = ["--training-free", "--delta", "--dtype", "bf16", "--json"];
    let share = ["--set", "calibration.cache_fraction=0.3"];
    let made = linearize(dir.path(), "student", &[&set, free.as_slice(), &share].concat());
    made.succeeded();
    assert!(made.stderr.contains("not trained"), "{}", made.stderr);
    let told = made.json();
    assert_eq!((&told["trained"], &told["export"]), (&false.into(), &"delta".into()));
    let read = |path: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(dir.path().join(path)).unwrap()).unwrap()
    };
    let (config, budgets) = (read("student/config.json"), read("student.run/budgets.json"));
    assert_eq!(config["still"]["budgets"], budgets["budgets"]);
    assert_eq!((&config["still"]["rows"], &budgets["rows"]), (&"int8".into(), &"int8".into()));
    assert!(budgets["key_exponents"][0][0].is_string());
    assert_eq!(config["still"]["key_exponents"], budgets["key_exponents"]);
    for stage in ["transfer", "finetune"] {
        assert_eq!(config["still_recipe"][stage]["steps"], 0, "{stage}");
    }
    assert!(config.get("still_lora").is_none_or(|lora| lora.is_null()), "nothing was trained");
    greedy(&dir.path().join("student"));
    // The usual share, if the recipe has none.
    let usual = linearize(dir.path(), "usual", &[&set, ["--training-free"].as_slice()].concat());
    usual.succeeded();
    assert_eq!(read("usual/config.json")["still_recipe"]["calibration"]["cache_fraction"], 0.2);
    linearize(dir.path(), "other", &["--training-free", "--resume"]).failed_with("--training-free");
}

#[test]
fn a_dry_run_without_training_plans_calibration_alone() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ["calibration.at_length=4096", "calibration.window=256", "calibration.tokens=1000"];
    let set: Vec<&str> = keys.iter().flat_map(|key| ["--set", key]).collect();
    let dry = |more: &[&str]| {
        let arguments = [&set, ["--training-free", "--dry-run"].as_slice(), more].concat();
        let outcome = linearize(dir.path(), "student", &arguments);
        for left in ["student", "student.run"] {
            assert!(!dir.path().join(left).exists(), "{left} was written");
        }
        outcome
    };
    let plan = dry(&["--json"]);
    plan.succeeded();
    let plan = plan.json();
    // Two layers of two selection heads; chunks of 64.
    assert_eq!(plan["heads"], 4);
    assert_eq!(plan["candidates"], serde_json::json!([0, 1, 2, 4, 8, 16, 32, 64]));
    let phases = plan["phases"].as_array().unwrap();
    let read = |n: usize| (phases[n]["phase"].as_str().unwrap(), phases[n]["tokens"].as_u64());
    // Two sequences of 512 tokens, each fed twice; then the text that the recipe asks for.
    assert_eq!((read(0), read(1)), (("retrieval", Some(2048)), ("text", Some(1000))));
    assert!(phases.iter().all(|phase| phase["seconds"].as_f64().unwrap() > 0.0), "{phases:?}");
    assert_eq!((&plan["timed_tokens"], &plan["cache"]["at_most"]), (&256.into(), &true.into()));
    let share =
        plan["cache"]["bytes"].as_f64().unwrap() / plan["cache"]["dense_bytes"].as_f64().unwrap();
    assert!((share - 0.2).abs() < 1e-3, "the usual share is a fifth, not {share}");
    let table = dry(&[]);
    table.succeeded();
    assert!(table.stdout.contains("losses on text") && table.stdout.contains("at most"));

    // What the run would refuse, its plan refuses; budgets of the recipe are not looked for.
    dry(&["--set", "calibration.cache_fraction=0.001"]).failed_with("is too small");
    dry(&["--set", "attention.router=none", "--set", "attention.budget=0"])
        .failed_with("nothing to find");
    let own = dry(&["--set", "attention.budgets=[[1, 2], [3, 4]]"]);
    own.succeeded();
    assert!(own.stdout.contains("nothing to calibrate"), "{}", own.stdout);
}

/// The usual recipe calibrates before it trains: a plan that leaves that out is too short.
#[test]
fn a_dry_run_counts_the_calibration() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("student")).unwrap();
    let plan = |more: &[&str]| {
        let options = [["--dry-run", "--json"].as_slice(), more].concat();
        let plan = linearize(dir.path(), "student", &options);
        plan.succeeded();
        assert!(plan.stderr.contains("student exists already"), "{}", plan.stderr);
        plan.json()
    };
    assert_eq!(plan(&[])["calibration"], serde_json::json!([]));
    let set =
        ["calibration.cache_fraction=0.5", "calibration.at_length=4096", "calibration.tokens=300"];
    let set: Vec<&str> = set.iter().flat_map(|key| ["--set", key]).collect();
    let plan = plan(&set);
    let list = |name: &str| plan[name].as_array().unwrap().clone();
    assert_eq!(list("calibration").len(), 2, "{plan}");
    let seconds = |part: &serde_json::Value| part["seconds"].as_f64().unwrap();
    let sum: f64 = list("calibration").iter().chain(&list("stages")).map(seconds).sum();
    assert!((seconds(&plan) - sum).abs() < 1e-9, "{plan}");
    let table = linearize(dir.path(), "student", &[["--dry-run"].as_slice(), &set].concat());
    table.succeeded();
    assert!(table.stdout.contains("\ncalibration  "), "{}", table.stdout);
}

/// Commands store rows as the recipe said, unless they are told otherwise, and say how.
#[test]
fn a_student_keeps_its_rows_as_its_recipe_says() {
    const ITEMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../still-eval/tests/data");
    let dir = tempfile::tempdir().unwrap();
    let measured = ["--set", "evaluation.every=2", "--set", "evaluation.windows=0"];
    let rows = ["--set", "evaluation.repeated_text=96", "--set", "attention.rows=int8"];
    linearize(dir.path(), "student", &[["--delta"].as_slice(), &measured, &rows].concat())
        .succeeded();
    let student = dir.path().join("student");
    let run = |arguments: &[&str]| {
        let outcome = Outcome::of(still().args(arguments).arg("--model").arg(&student));
        outcome.succeeded();
        outcome
    };
    let prompt = words(300);
    let generated = |extra: &[&str]| {
        let arguments = ["generate", "--max-new-tokens", "2", "--json", "--prompt", &prompt];
        let outcome = run(&[arguments.as_slice(), extra].concat());
        (outcome.json()["cache_bytes"].as_u64().unwrap(), outcome.stderr)
    };
    let (bytes, said) = generated(&[]);
    assert!(said.contains("exact rows in int8, as the student says"), "{said}");
    let (wide, said) = generated(&["--cache-dtype", "bf16"]);
    assert!(said.contains("in bf16, as --cache-dtype says; the student says int8"), "{said}");
    assert!(bytes < wide, "{bytes} and {wide}");

    let results = dir.path().join("r.json");
    let tasks = ["eval", "--data-dir", ITEMS, "--tasks", "piqa", "--out"];
    let base = ["--compare", teacher_dir().to_str().unwrap()];
    run(&[tasks.as_slice(), &[results.to_str().unwrap()], &base].concat());
    let results: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(results).unwrap()).unwrap();
    assert_eq!(results["cache_dtype"], "int8");
    assert_eq!(results["compare"][0]["cache_dtype"], "f32", "a base says nothing");

    let variants = ["bench", "model", "--variants", "dense,student", "--contexts", "200"];
    let timed = run(&[variants.as_slice(), &["--new-tokens", "2", "--json"]].concat());
    let dtypes: Vec<String> = timed
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["cache_dtype"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(dtypes, ["bf16", "int8"]);

    let linear = ["--set", "attention.mode=linear_only", "--set", "attention.router=none"];
    linearize(dir.path(), "other", &[linear.as_slice(), &rows].concat())
        .failed_with("keeps no exact rows");
}
