//! `still report run` on hand-made run directories and on a real one.

use std::fs;
use std::path::Path;

use crate::common::{Outcome, assert_balanced, linearize_args, still, teacher_dir, words};

const RECIPE: &str = r#"seed = 0

[attention]
chunk = 64
budget = 4
budgets = [[64, 4], [4, 0]]
router = "self_saliency"
linear_norm = "mean"

[transfer]
steps = 4

[finetune]
steps = 3
"#;

/// Two stages, the second not finished; one step skipped; three evaluations.
fn run_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let transfer = |step: usize, loss: f64, layers: [f64; 2], skipped: &str| {
        format!(
            r#"{{"stage":"transfer","step":{step},"loss":{loss},"grad_norm":{},"lr":0.01,"tokens":1024,"layer_losses":[{},{}]{skipped}}}"#,
            loss * 3.0,
            layers[0],
            layers[1]
        )
    };
    let finetune = |step: usize, loss: f64| {
        format!(
            r#"{{"stage":"finetune","step":{step},"loss":{loss},"grad_norm":0.5,"lr":0.001,"tokens":2048}}"#
        )
    };
    let metrics = [
        transfer(1, 0.02, [0.01, 0.03], ""),
        transfer(2, 0.01, [0.005, 0.015], ""),
        transfer(3, 9.5, [1.0, 18.0], r#","skipped":true"#),
        transfer(4, 0.0005, [0.0004, 0.0006], ""),
        finetune(1, 0.25),
        finetune(2, 0.125),
    ];
    let evaluations = [
        r#"{"stage":"transfer","step":2,"heldout_nll":3.5,"passkey_recall":0.25,"best":true,"seconds":1.5}"#,
        r#"{"stage":"transfer","step":4,"heldout_nll":3.25,"passkey_recall":0.75,"best":true,"seconds":1.5}"#,
        r#"{"stage":"finetune","step":2,"heldout_nll":3.3,"best":false,"seconds":90}"#,
    ];
    let lines = |lines: &[String]| lines.join("\n") + "\n";
    fs::write(dir.path().join("metrics.jsonl"), lines(&metrics)).unwrap();
    fs::write(dir.path().join("evaluations.jsonl"), lines(&evaluations.map(str::to_owned)))
        .unwrap();
    fs::write(dir.path().join("recipe.toml"), RECIPE).unwrap();
    dir
}

fn report(dir: &Path, extra: &[&str]) -> Outcome {
    Outcome::of(still().args(["report", "run"]).arg(dir).args(extra))
}

fn page(dir: &Path) -> String {
    fs::read_to_string(dir.join("report.html")).unwrap()
}

#[test]
fn the_page_shows_the_whole_run_and_asks_for_nothing() {
    let dir = run_dir();
    report(dir.path(), &[]).succeeded();
    let page = page(dir.path());
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    for outside in ["http:", "https:", " src=", "<link", "@import", "url("] {
        assert!(!page.contains(outside), "the page refers to {outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
    assert_balanced(&page);
    for wrong in ["NaN", "inf\"", "{{", "{%", "none"] {
        let body = &page[page.find("<body>").unwrap()..page.find("<script>").unwrap()];
        assert!(!body.contains(wrong), "{wrong} in the page");
    }
    for part in [
        "4 transfer, 2 of 3 finetune",
        "Attention transfer: 4 steps, 4,096 tokens",
        "Low-rank finetuning: 2 of 3 steps, 4,096 tokens",
        "<dt>Skipped steps</dt><dd>1</dd>",
        "step 3 was skipped: loss 9.5",
        "<tr><td>3</td><td>9.5</td><td>28.5</td></tr>",
        "<tr><td>1</td><td>0.03</td><td>0.0006</td><td>0.02</td></tr>",
        "layer 1\nfirst step 0.03\nlast step 0.0006",
        "<tr class=\"best\"><td>transfer</td><td>4</td><td>3.25</td><td>0.75</td><td>1.5 s</td><td>best</td></tr>",
        "<tr><td>finetune</td><td>2</td><td>3.3</td><td>–</td><td>1 min 30 s</td><td></td></tr>",
        "best: transfer step 4",
        "layer 0, head 0: 64",
        "18.0 of 64 on average; 1 of 4 heads full",
        "budgets = [[64, 4], [4, 0]]",
    ] {
        assert!(page.contains(part), "no {part:?} in the page");
    }
    // Two stages of three charts, two metrics, the layers, the budgets.
    assert_eq!(page.matches("<figure").count(), 3 + 3 + 2 + 1 + 1);
}

#[test]
fn the_page_says_what_made_the_run_and_draws_the_teacher() {
    let dir = run_dir();
    report(dir.path(), &[]).succeeded();
    let plain = page(dir.path());
    assert!(!plain.contains("Made by") && !plain.contains("class=\"level\""), "nothing is known");
    let teacher = r#"{"heldout_nll":3.0,"passkey_recall":1.0,"seconds":2.5}"#;
    fs::write(dir.path().join("teacher.json"), teacher).unwrap();
    let start = |command: &str, date: &str| {
        format!(
            r#"{{"model":"org/base","command":"{command}","date":"{date}","machine":"a CPU, 2 threads","version":"1.2"}}"#
        )
    };
    let starts = [
        start("still linearize --out '<s>'", "2026-11-29 20:21"),
        start("still linearize --resume", "2026-11-30 08:00"),
    ];
    fs::write(dir.path().join("starts.jsonl"), starts.join("\n") + "\n").unwrap();
    let outcome = report(dir.path(), &["--json"]);
    outcome.succeeded();
    let json = outcome.json();
    assert_eq!(json["teacher"]["heldout_nll"], 3.0);
    assert_eq!(json["starts"][1]["command"], "still linearize --resume");
    let page = page(dir.path());
    assert_balanced(&page);
    for part in [
        "<title>still report run: ",
        "<dt>Teacher</dt><dd>base</dd>",
        "<dt>Model</dt><dd>org&#x2f;base</dd>",
        "<dt>Machine</dt><dd>a CPU, 2 threads</dd>",
        "<dt>Date</dt><dd>2026-11-29 20:21 UTC, still 1.2</dd>",
        "<dt>Command</dt><dd>still linearize --resume</dd>",
        "<tr class=\"teacher\"><td>teacher</td><td>–</td><td>3</td><td>1</td><td>2.5 s</td><td></td></tr>",
        "data-tip=\"teacher 3\"",
    ] {
        assert!(page.contains(part), "no {part:?} in the page");
    }
    assert_eq!(page.matches("class=\"level\"").count(), 2, "one for each metric");
    assert!(!page.contains("<s>"), "a command is text");
    assert!(report(dir.path(), &[]).stdout.contains("teacher"), "the table has the teacher");
    fs::write(dir.path().join("teacher.json"), "{").unwrap();
    report(dir.path(), &[]).failed_with("teacher.json");
}

#[test]
fn the_tables_are_the_result() {
    let dir = run_dir();
    let outcome = report(dir.path(), &["--quiet"]);
    outcome.succeeded();
    assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
    insta::assert_snapshot!(outcome.stdout, @r"
    stage      steps  tokens  skipped  first loss  last loss
    --------------------------------------------------------
    transfer       4   4,096        1        0.02     0.0005
    finetune  2 of 3   4,096        0        0.25      0.125

    evaluation  step  held-out loss  pass-key recall
    -------------------------------------------------------------
    transfer       2            3.5             0.25  best so far
    transfer       4           3.25             0.75  best so far
    finetune       2            3.3                –

    transfer: layer  first loss  last loss  ratio
    ---------------------------------------------
    0                      0.01     0.0004   0.04
    1                      0.03     0.0006   0.02
    ");
}

#[test]
fn json_has_the_same_figures() {
    let dir = run_dir();
    let out = dir.path().join("elsewhere.html");
    let outcome = report(dir.path(), &["--json", "--out", out.to_str().unwrap()]);
    outcome.succeeded();
    assert!(out.exists() && !dir.path().join("report.html").exists());
    let json = outcome.json();
    assert_eq!(json["stages"][0]["skipped"], 1);
    assert_eq!(json["stages"][0]["first_loss"], 0.02);
    assert_eq!(json["stages"][0]["last_loss"], 0.0005);
    assert_eq!(json["stages"][1]["steps"], 2);
    assert_eq!(json["stages"][1]["planned"], 3);
    assert_eq!(json["layers"][1]["layer"], 1);
    assert!((json["layers"][1]["ratio"].as_f64().unwrap() - 0.02).abs() < 1e-12);
    assert_eq!(json["evaluations"][1]["passkey_recall"], 0.75);
    assert_eq!(json["evaluations"][2]["best"], false);
}

#[test]
fn text_of_the_run_cannot_become_markup() {
    let dir = run_dir();
    let evil = "</pre><script>alert(1)</script>";
    fs::write(
        dir.path().join("recipe.toml"),
        format!("# {evil}\n[attention]\nrouter = \"{evil}\"\n"),
    )
    .unwrap();
    let line = format!(r#"{{"stage":"{evil}","step":1,"<img>":1.5,"best":true}}"#);
    fs::write(dir.path().join("evaluations.jsonl"), line + "\n").unwrap();
    report(dir.path(), &[]).succeeded();
    let page = page(dir.path());
    assert!(!page.contains("alert(1)</script>") && !page.contains("<img>"), "{page}");
    assert_balanced(&page);
}

#[test]
fn a_run_without_evaluations_or_budgets_is_drawn_too() {
    let dir = run_dir();
    fs::remove_file(dir.path().join("evaluations.jsonl")).unwrap();
    fs::write(dir.path().join("recipe.toml"), "[attention]\nchunk = 64\nbudget = 4\n").unwrap();
    report(dir.path(), &[]).succeeded();
    let text = page(dir.path());
    assert!(!text.contains("Evaluations") && text.contains("4 of 64 in every head"));
    fs::remove_file(dir.path().join("recipe.toml")).unwrap();
    report(dir.path(), &[]).succeeded();
    assert!(page(dir.path()).contains("has no recipe.toml"));
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    report(&dir.path().join("missing"), &[]).failed_with("no directory");
    report(dir.path(), &[]).failed_with("has no metrics.jsonl");
    fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
    report(dir.path(), &[]).failed_with("records no step yet");
    let run = run_dir();
    report(run.path(), &["--out", dir.path().to_str().unwrap()]).failed_with("is a directory");
    report(run.path(), &["--out", "/no/such/directory/page.html"])
        .failed_with("/no/such/directory");
    fs::write(run.path().join("recipe.toml"), "[attention\n").unwrap();
    report(run.path(), &[]).failed_with("recipe.toml");
    assert!(!run.path().join("report.html").exists());
}

#[test]
fn damaged_lines_are_named_and_a_line_cut_off_is_not_missed() {
    let dir = run_dir();
    let path = dir.path().join("metrics.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 20]).unwrap();
    let outcome = report(dir.path(), &["--json"]);
    outcome.succeeded();
    assert_eq!(outcome.json()["stages"][1]["steps"], 1);

    let mut lines: Vec<&str> = whole.lines().collect();
    lines[2] = "{\"stage\":\"transfer\",\"step\":3}";
    fs::write(&path, lines.join("\n")).unwrap();
    let outcome = report(dir.path(), &[]);
    outcome.failed_with("metrics.jsonl line 3: missing field `loss`");
    fs::write(&path, &whole).unwrap();
    fs::write(dir.path().join("evaluations.jsonl"), "{}\n").unwrap();
    report(dir.path(), &[]).failed_with("evaluations.jsonl line 1: missing field `stage`");
}

#[test]
fn a_real_run_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, words(2000)).unwrap();
    let out = dir.path().join("student");
    let short = ["data.length=128", "transfer.steps=3", "finetune.steps=2"];
    Outcome::of(
        still()
            .args(linearize_args(teacher_dir(), &data, &out))
            .args(short.iter().flat_map(|value| ["--set", value])),
    )
    .succeeded();
    let run = dir.path().join("student.run");
    report(&run, &[]).succeeded();
    let page = page(&run);
    assert_balanced(&page);
    assert!(page.contains("4 of 64 in every head") && page.contains("3 transfer, 2 finetune"));
}
