//! `still calibrate` on a small random model.

use std::fs;
use std::path::Path;

use crate::common::{Outcome, assert_balanced, still, student_dir, teacher_dir, words};

fn calibrate(dir: &Path, extra: &[&str]) -> Outcome {
    let data = dir.join("data.txt");
    fs::write(&data, words(600)).unwrap();
    let mut command = still();
    command.args(["calibrate", "--at-length", "4096", "--window", "512", "--data"]).arg(&data);
    if !extra.contains(&"--model") {
        command.arg("--model").arg(teacher_dir());
    }
    Outcome::of(command.args(extra))
}

#[test]
fn budgets_are_shown_written_and_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("budgets.json");
    let html = dir.path().join("budgets.html");
    let files = ["--out", out.to_str().unwrap(), "--html", html.to_str().unwrap()];
    let shown = calibrate(dir.path(), &[["--cache-fraction", "0.5"].as_slice(), &files].concat());
    shown.succeeded();
    let page = fs::read_to_string(&html).unwrap();
    for title in ["Budgets", "Retrieval", "Loss left", "Loss with nothing kept", "Other shares"] {
        assert!(page.contains(title), "no {title:?} in the page");
    }
    for part in [
        "<title>still calibrate: ",
        "<h1>Budgets of every head</h1>",
        "class=\"verdict\"",
        "Pass keys",
        "Whole heads",
        "<dt>Command</dt><dd>still calibrate ",
        "<dt>Machine</dt>",
    ] {
        assert!(page.contains(part), "no {part:?} in the page");
    }
    assert_balanced(&page);
    assert!(!page.contains("http"), "a page asks for nothing from outside");
    assert!(shown.stdout.contains("of the dense cache"), "{}", shown.stdout);
    let file: serde_json::Value = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
    assert_eq!((&file["chunk"], &file["cache_fraction"]), (&64.into(), &0.5.into()));
    let told = calibrate(dir.path(), &["--cache-fraction", "0.5", "--json"]);
    told.succeeded();
    let told = told.json();
    assert_eq!(told["budgets"], file["budgets"]);
    let (cache, dense) = (told["cache_bytes"].as_u64(), told["dense_bytes"].as_u64());
    assert!(2 * cache.unwrap() <= dense.unwrap());
    let parts = told["cache_parts"].as_object().unwrap();
    assert_eq!(parts.values().map(|part| part.as_u64().unwrap()).sum::<u64>(), cache.unwrap());
    assert_eq!((&file["rows"], &told["rows"]), (&"bf16".into(), &"bf16".into()));
    assert!(shown.stdout.contains("with rows in bf16"), "{}", shown.stdout);
    let exponents = file["key_exponents"][1][1].as_str().unwrap();
    assert!(exponents.split(' ').all(|e| e.parse::<i8>().is_ok()), "{exponents}");
    assert_eq!(file["key_exponents"], told["key_exponents"]);
    let narrow = calibrate(dir.path(), &["--cache-fraction", "0.3", "--rows", "int8"]);
    narrow.succeeded();
    assert!(narrow.stdout.contains("with rows in int8"), "{}", narrow.stdout);
    // Other shares, by row format: narrower rows keep as many heads whole in fewer bytes.
    let outlook = told["outlook"].as_array().unwrap();
    let rows: Vec<&str> = outlook.iter().map(|rows| rows["rows"].as_str().unwrap()).collect();
    assert_eq!(rows, ["bf16", "int8", "int4"]);
    for rows in outlook {
        // What is recommended is a thousandth above the knee at most, and among the shares that are looked at.
        let Some(recommended) = rows["recommended"].as_f64() else { continue };
        assert!((0.0..0.001).contains(&(recommended - rows["knee"].as_f64().unwrap())), "{rows}");
        let shares =
            rows["points"].as_array().unwrap().iter().map(|point| &point["cache_fraction"]);
        assert_eq!(shares.filter(|share| **share == recommended).count(), 1, "{rows}");
    }
    let keys = &told["pass_keys"];
    assert_eq!(
        (&keys["keys"], &keys["length"]),
        (&4.into(), &512.into()),
        "all that the model reads: {keys}"
    );
    let asked = keys["points"].as_array().unwrap();
    assert_eq!(asked.len(), outlook[0]["points"].as_array().unwrap().len());
    assert!(asked.iter().all(|point| point["found"].as_u64().unwrap() <= 4), "{keys}");
    let cost = |n: usize| outlook[n]["whole_head_bytes"].as_u64().unwrap();
    assert!(cost(0) > cost(1) && cost(1) > cost(2));
    for words in ["Other shares", "bf16 whole", "int8: a whole head takes", "keys"] {
        assert!(shown.stdout.contains(words), "no {words:?} in {}", shown.stdout);
    }
    calibrate(dir.path(), &["--out", out.to_str().unwrap()]).failed_with("exists already");
    calibrate(dir.path(), &["--html", html.to_str().unwrap()]).failed_with("exists already");

    let mut linearize = still();
    linearize.args(["linearize", "--data"]).arg(dir.path().join("data.txt"));
    linearize.arg("--model").arg(teacher_dir()).arg("--out").arg(dir.path().join("student"));
    for set in [
        "calibration.cache_fraction=0.5",
        "calibration.at_length=4096",
        "calibration.window=512",
        "data.length=256",
        "transfer.steps=1",
        "finetune.steps=1",
    ] {
        linearize.args(["--set", set]);
    }
    Outcome::of(&mut linearize).succeeded();
    let config = fs::read_to_string(dir.path().join("student/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["still"]["budgets"], file["budgets"]);
    assert!(dir.path().join("student.run/budgets.json").exists());
}

#[test]
fn no_pass_keys_are_asked_for_unless_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = calibrate(dir.path(), &["--cache-fraction", "0.5", "--keys", "0", "--json"]);
    outcome.succeeded();
    assert!(outcome.json()["pass_keys"].is_null());
}

#[test]
fn what_cannot_be_calibrated_says_why() {
    let dir = tempfile::tempdir().unwrap();
    calibrate(dir.path(), &["--cache-fraction", "0.001"]).failed_with("too small");
    calibrate(dir.path(), &["--cache-fraction", "1.5"]).failed_with("out of range");
    let student = student_dir().to_str().unwrap();
    calibrate(dir.path(), &["--model", student]).failed_with("a student already");
    calibrate(dir.path(), &["--set", "attention.router=none"]).failed_with("nothing to find");
}
