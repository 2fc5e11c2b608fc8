//! What `--data`, `--recipe` and `--budgets` take.

use std::fs;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::common::{Outcome, linearize_args, still, teacher_dir, words};

/// Plans a run on `data`; nothing is trained.
fn plan(cache: &Path, data: &Path, more: &[&str]) -> Outcome {
    let mut command = still();
    // Where no folder is called as what is built in.
    command.env("STILL_CACHE", cache).current_dir(teacher_dir());
    command.args(linearize_args(teacher_dir(), data, Path::new("never-made")));
    Outcome::of(command.args(["--dry-run", "--set", "data.length=128"]).args(more))
}

#[test]
fn a_folder_is_read_whole_in_the_order_of_its_paths() {
    let dir = tempfile::tempdir().unwrap();
    let (texts, cache) = (dir.path().join("texts"), dir.path().join("cache"));
    fs::create_dir_all(texts.join("more")).unwrap();
    plan(&cache, &texts, &[]).failed_with("no data in this folder");
    fs::write(texts.join("a.txt"), words(500)).unwrap();
    fs::write(texts.join("notes.md"), words(400)).unwrap();
    fs::write(texts.join("code.rs"), "fn main() {}").unwrap();
    let lines: String =
        (0..3).map(|_| serde_json::json!({ "text": words(300) }).to_string() + "\n").collect();
    let file = fs::File::create(texts.join("more/lines.jsonl.gz")).unwrap();
    let mut gzip = GzEncoder::new(file, Compression::fast());
    gzip.write_all(lines.as_bytes()).unwrap();
    gzip.finish().unwrap();
    let read = plan(&cache, &texts, &[]);
    read.succeeded();
    assert!(read.stderr.contains("in 5 documents"), "{}", read.stderr);

    let whole = fs::read(texts.join("more/lines.jsonl.gz")).unwrap();
    fs::write(texts.join("more/lines.jsonl.gz"), &whole[..whole.len() / 2]).unwrap();
    plan(&cache, &texts, &[]).failed_with("lines.jsonl.gz");
}

#[test]
fn a_byte_order_mark_is_no_data() {
    let dir = tempfile::tempdir().unwrap();
    let line = serde_json::json!({ "text": words(300) }).to_string();
    let tokens = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        let read = plan(&dir.path().join("cache"), &file, &[]);
        read.succeeded();
        read.stderr.lines().find(|line| line.trim().starts_with("Data")).unwrap().to_owned()
    };
    for (name, text) in [("a.jsonl", line), ("A.TXT", words(300))] {
        let plain = tokens(name, &text);
        assert_eq!(tokens(&format!("marked-{name}"), &format!("\u{feff}{text}")), plain);
    }
}

#[test]
fn the_demos_books_have_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let read = plan(dir.path(), Path::new("demo"), &[]);
    read.succeeded();
    assert!(read.stderr.contains("in 1 document"), "{}", read.stderr);
    assert!(dir.path().join("demo/books.txt").is_file());
}

#[test]
fn without_a_recipe_there_is_a_usual_one() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("data.txt"), dir.path().join("student"));
    fs::write(&data, words(1500)).unwrap();
    let linearize = |more: &[&str]| {
        let mut command = still();
        command.env("STILL_CACHE", dir.path().join("cache")).arg("linearize");
        command.arg("--model").arg(teacher_dir()).arg("--data").arg(&data).arg("--out").arg(&out);
        for set in ["data.length=256", "transfer.steps=1", "finetune.steps=1"] {
            command.args(["--set", set]);
        }
        Outcome::of(command.args(more))
    };
    // It calibrates, which needs text that is longer than two chunks.
    let told = linearize(&[
        "--set",
        "calibration.at_length=4096",
        "--set",
        "calibration.cache_fraction=0.5",
    ]);
    told.succeeded();
    assert!(told.stderr.contains("quick, the usual one for cpu"), "{}", told.stderr);
    let budgets = dir.path().join("student.run/budgets.json");
    let found = fs::read_to_string(&budgets).unwrap();
    let kept = dir.path().join("budgets.json");
    fs::write(&kept, found.replace("64", "32").replacen("\"chunk\":32", "\"chunk\":64", 1))
        .unwrap();
    fs::remove_dir_all(dir.path().join("student.run")).unwrap();

    linearize(&["--overwrite", "--budgets", kept.to_str().unwrap()]).succeeded();
    let read = |path: &Path| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    assert_eq!(read(&out.join("config.json"))["still"]["budgets"], read(&kept)["budgets"]);
    assert!(!budgets.exists(), "nothing was calibrated");
    linearize(&["--overwrite", "--budgets", "none.json"]).failed_with("none.json");
    // Those of a model with another layer.
    let mut other = read(&kept);
    let layers = other["budgets"].as_array_mut().unwrap();
    layers.push(layers[0].clone());
    let other_file = dir.path().join("other.json");
    fs::write(&other_file, other.to_string()).unwrap();
    let refused = linearize(&["--dry-run", "--budgets", other_file.to_str().unwrap()]);
    refused.failed_with("other.json does not fit ");
    assert!(refused.stderr.contains("still calibrate --out"), "{}", refused.stderr);
}

#[test]
fn recipes_are_listed_and_printed_whole() {
    let list = Outcome::of(still().args(["recipes", "list"]));
    list.succeeded();
    for name in ["quick", "still-long", "paper", "window-only"] {
        let starts = |line: &str| line.starts_with(&format!("{name} "));
        assert!(list.stdout.lines().any(starts), "{}", list.stdout);
    }
    assert!(list.stdout.lines().all(|line| line.chars().count() <= 80), "{}", list.stdout);
    let shown = Outcome::of(still().args(["recipes", "show", "quick"]));
    shown.succeeded();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/quick.toml");
    assert_eq!(shown.stdout, fs::read_to_string(file).unwrap());
    Outcome::of(still().args(["recipes", "show", "slow"])).failed_with("invalid value 'slow'");
}
