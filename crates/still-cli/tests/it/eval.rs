//! `still eval`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{Outcome, still, student_dir, teacher_dir, words};
use tempfile::TempDir;

/// Hand-made items.
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../still-eval/tests/data");

fn eval(model: &Path, arguments: &[&str]) -> Outcome {
    Outcome::of(
        still().args(["eval", "--data-dir", DATA]).args(arguments).arg("--model").arg(model),
    )
}

fn path(dir: &TempDir, name: &str) -> (PathBuf, String) {
    let path = dir.path().join(name);
    let text = path.to_str().unwrap().to_owned();
    (path, text)
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Results but for the time they took.
fn untimed(path: &Path) -> serde_json::Value {
    let mut results = json(path);
    let timing = results.as_object_mut().unwrap().remove("timing");
    assert!(timing.is_some_and(|timing| timing.is_object()), "{results}");
    // Nor is the command, of a run that is resumed.
    let made = results.as_object_mut().unwrap().remove("provenance");
    assert!(made.is_some_and(|made| made["command"].is_string()), "{results}");
    results
}

#[test]
fn every_task_has_its_row_and_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let (results, results_arg) = path(&dir, "r.json");
    let tasks = "piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu,lambada_openai";
    let outcome = eval(
        teacher_dir(),
        &["--tasks", tasks, "--shots", "2", "--out", &results_arg, "--seed", "7"],
    );
    outcome.succeeded();
    let results = json(&results);
    assert_eq!(results["model"], teacher_dir().to_str().unwrap());
    assert_eq!(results["cache_dtype"], "f32");
    assert_eq!((&results["seed"], &results["recipe"]), (&7.into(), &serde_json::Value::Null));
    for (task, n) in tasks.split(',').zip([5, 3, 2, 3, 3, 5, 3]) {
        let scores = &results["tasks"][task];
        assert_eq!(scores["n"], n, "{task}");
        assert!(scores["acc"].is_number() && scores["stderr"].is_number(), "{task}: {scores}");
        assert!(outcome.stdout.contains(&format!("\n{task} ")), "{}", outcome.stdout);
    }
    assert!(results["tasks"]["piqa"]["acc_norm"].is_number());
    assert!(results["tasks"]["winogrande"].get("acc_norm").is_none());
    assert!(results["tasks"]["lambada_openai"]["perplexity"].as_f64().unwrap() > 1.0);
    assert_eq!(results["tasks"]["piqa"]["chance"], 0.5);
    assert_eq!(results["tasks"]["mmlu"]["groups"]["map_reading"]["n"], 2);
    // Shares have Wilson's interval: a width even where all or none of five is right.
    for task in tasks.split(',') {
        let scores = &results["tasks"][task];
        let end = |n: usize| scores["intervals"]["acc"][n].as_f64().unwrap();
        let acc = scores["acc"].as_f64().unwrap();
        assert!(
            0.0 <= end(0) && end(0) <= acc && acc <= end(1) && end(1) <= 1.0,
            "{task}: {scores}"
        );
        assert!(end(1) - end(0) > 0.3, "{task}: {scores}");
        assert!(scores["cache_bytes"].as_f64().unwrap() > 0.0, "{task}: {scores}");
        assert!(results["timing"][task]["tokens"].as_u64().unwrap() > 0, "{task}: {results}");
    }
    let perplexity = &results["tasks"]["lambada_openai"];
    let end = |n: usize| perplexity["intervals"]["perplexity"][n].as_f64().unwrap();
    assert!(end(0) < perplexity["perplexity"].as_f64().unwrap() && end(0) > 0.0);
    assert!(outcome.stdout.contains("95 % interval"), "{}", outcome.stdout);
}

/// Ctrl-C keeps what is finished; the resumed run asks the rest and ends as an uninterrupted one.
#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on() {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let dir = tempfile::tempdir().unwrap();
    let (text, _) = path(&dir, "t.txt");
    fs::write(&text, words(60_000)).unwrap();
    let command = |name: &str| {
        let mut command = Command::new(crate::common::BINARY);
        command.args(["eval", "--tasks", "perplexity", "--lengths", "512", "--batch-size", "1"]);
        command.arg("--model").arg(teacher_dir()).arg("--text").arg(&text);
        command.arg("--samples").arg(dir.path().join(format!("{name}.jsonl")));
        command.arg("--out").arg(dir.path().join(format!("{name}.json")));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let samples = |name: &str| -> Vec<serde_json::Value> {
        let text = fs::read_to_string(dir.path().join(format!("{name}.jsonl"))).unwrap_or_default();
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let child = command("cut").spawn().unwrap();
    let patience = Instant::now();
    while samples("cut").len() < 3 && patience.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    let interrupted =
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: interrupted after "), "{stderr}");
    assert!(stderr.contains("add --resume to go on from"), "{stderr}");
    assert!(!dir.path().join("cut.json").exists(), "results of half a run");
    let kept = samples("cut");
    assert!(kept.len() >= 3);

    assert!(command("whole").output().unwrap().status.success());
    let whole = samples("whole");
    assert!(kept.len() < whole.len(), "nothing was left to ask");
    assert!(command("cut").arg("--resume").output().unwrap().status.success());
    // What was kept is still there, and no item was asked twice.
    assert!(samples("cut") == whole, "the resumed run differs from the uninterrupted one");
    assert_eq!(untimed(&dir.path().join("cut.json")), untimed(&dir.path().join("whole.json")));
    assert_eq!(samples("cut")[..kept.len()], kept[..]);
}

#[test]
fn samples_resume_and_batches_give_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        let (results, results_arg) = path(&dir, &format!("{name}.json"));
        let (samples, samples_arg) = path(&dir, &format!("{name}.jsonl"));
        let common = ["--tasks", "piqa,arc_easy", "--out", &results_arg, "--samples", &samples_arg];
        let outcome = eval(student_dir(), &[&common, more].concat());
        (outcome, results, samples)
    };
    let (outcome, results, samples) = run("whole", &[]);
    outcome.succeeded();
    let whole = (untimed(&results), fs::read_to_string(&samples).unwrap());
    assert_eq!(whole.1.lines().count(), 1 + 5 + 3);

    let (again, _, _) = run("whole", &[]);
    again.failed_with("whole.jsonl exists already");
    let (outcome, results, samples) = run("one-by-one", &["--batch-size", "1", "--threads", "1"]);
    outcome.succeeded();
    assert_eq!(untimed(&results), whole.0);

    // As if killed in the middle of the second task.
    let cut: usize = whole.1.lines().take(7).map(|line| line.len() + 1).sum();
    fs::write(&samples, &whole.1[..cut + 20]).unwrap();
    let (outcome, results, samples) = run("one-by-one", &["--resume"]);
    outcome.succeeded();
    assert_eq!(untimed(&results), whole.0);
    let ids = |text: &str| -> Vec<String> {
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.map(|line: serde_json::Value| format!("{} {}", line["task"], line["id"])).collect()
    };
    assert_eq!(ids(&fs::read_to_string(&samples).unwrap()), ids(&whole.1));
}

#[test]
fn others_are_compared_item_by_item() {
    let dir = tempfile::tempdir().unwrap();
    let (text, text_arg) = path(&dir, "t.txt");
    fs::write(&text, words(200)).unwrap();
    let (results, results_arg) = path(&dir, "r.json");
    let other = teacher_dir().to_str().unwrap();
    let tasks = ["--tasks", "piqa,perplexity", "--text", &text_arg, "--lengths", "100,300"];
    let outcome =
        eval(student_dir(), &[&tasks[..], &["--compare", other, "--out", &results_arg]].concat());
    outcome.succeeded();
    let results = json(&results);
    let compared = &results["compare"][0];
    assert_eq!(compared["model"], other);
    let acc = |tasks: &serde_json::Value| tasks["piqa"]["acc"].as_f64().unwrap();
    let difference = &compared["difference"]["piqa"]["acc"];
    let expected = acc(&results["tasks"]) - acc(&compared["tasks"]);
    assert!((difference["mean"].as_f64().unwrap() - expected).abs() < 1e-12);
    // Up to two chunks a student is its teacher; beyond, an untrained one is not.
    let nll = |length: &str| compared["difference"][length]["nll"]["mean"].as_f64().unwrap();
    assert!(nll("perplexity_100").abs() < 1e-4 && nll("perplexity_300").abs() > 1e-4);
    assert_eq!(results["tasks"]["perplexity_300"]["curve"].as_array().unwrap().len(), 16);
    assert!(outcome.stdout.contains("difference to teacher"), "{}", outcome.stdout);
    eval(student_dir(), &["--tasks", "piqa", "--compare", student_dir().to_str().unwrap()])
        .failed_with("compared with itself");
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let model = teacher_dir();
    eval(model, &["--tasks", "piqa,chess"]).failed_with("no task is called chess");
    eval(model, &["--tasks", "piqa,piqa"]).failed_with("named twice");
    eval(model, &["--tasks", "piqa", "--shots", "3"]).failed_with("--shots is of mmlu");
    eval(model, &["--tasks", "mmlu"]).failed_with("3 examples of kitchen_science, 5");
    eval(model, &["--tasks", "piqa", "--limit", "0"]).failed_with("--limit 0");
    eval(model, &["--tasks", "piqa", "--batch-size", "0"]).failed_with("--batch-size 0");
    eval(model, &["--tasks", "perplexity"]).failed_with("needs a text");
    eval(model, &["--tasks", "piqa", "--stride", "9"]).failed_with("--stride");

    let dir = tempfile::tempdir().unwrap();
    let in_dir = |arguments: &[&str]| {
        Outcome::of(
            still()
                .args(["eval", "--model"])
                .arg(model)
                .arg("--data-dir")
                .arg(dir.path())
                .args(arguments),
        )
    };
    in_dir(&["--tasks", "piqa"]).failed_with("piqa.jsonl");
    fs::write(dir.path().join("piqa.jsonl"), "{\"query\": \"q\"").unwrap();
    in_dir(&["--tasks", "piqa"]).failed_with("piqa.jsonl, line 1: the line is cut short");
    let (text, text_arg) = path(&dir, "t.txt");
    fs::write(&text, "short").unwrap();
    in_dir(&["--tasks", "perplexity", "--text", &text_arg]).failed_with("needs 1024 tokens");
}

#[test]
fn files_without_end_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["piqa.jsonl", "text.txt"] {
        fs::File::create(dir.path().join(name)).unwrap().set_len((1 << 30) + 1).unwrap();
    }
    let text = path(&dir, "text.txt").1;
    for arguments in [
        &["--tasks", "piqa"][..],
        &["--tasks", "perplexity", "--text", &text],
        &["--tasks", "niah_single_2", "--text", &text],
    ] {
        let mut command = still();
        command.arg("eval").args(arguments).arg("--data-dir").arg(dir.path());
        Outcome::of(command.arg("--model").arg(teacher_dir()))
            .failed_with("it has more than 1 GiB");
    }
}
