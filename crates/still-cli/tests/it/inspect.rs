//! `still inspect` on a small random model.

use std::fs;

use crate::common::{Outcome, still, student_dir, teacher_dir, words};

#[test]
fn a_student_is_summarized_and_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    let html = dir.path().join("page.html");
    fs::write(&text, words(600)).unwrap();
    let outcome = Outcome::of(
        still()
            .args(["inspect", "--max-tokens", "512", "--model"])
            .arg(student_dir())
            .arg("--text")
            .arg(&text)
            .arg("--html")
            .arg(&html),
    );
    outcome.succeeded();
    assert!(outcome.stdout.starts_with("512 tokens, chunks of "), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("Self-Saliency Score"));
    assert!(outcome.stderr.contains("--max-tokens"), "{}", outcome.stderr);
    let page = fs::read_to_string(&html).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    assert!(!page.contains("{{") && !page.contains("{%") && !page.contains("https:"));
    let model = student_dir().file_name().unwrap().to_str().unwrap();
    for part in [
        format!("<title>still inspect: {model} reads "),
        "Heads that keep most".into(),
        "id=\"why\" aria-live".into(),
        "<dt>Command</dt><dd>still inspect --max-tokens 512 ".into(),
        "<dt>Machine</dt>".into(),
    ] {
        assert!(page.contains(&part), "no {part:?} in the page");
    }
}

#[test]
fn json_counts_what_the_budget_promises() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    fs::write(&text, words(600)).unwrap();
    let outcome = Outcome::of(
        still()
            .args(["inspect", "--json", "--max-tokens", "512", "--budget", "5", "--model"])
            .arg(teacher_dir())
            .arg("--text")
            .arg(&text),
    );
    outcome.succeeded();
    let report = outcome.json();
    assert_eq!(report["hypothetical"], true);
    // 8 chunks of 64, the last two of them the window: 6 retired.
    for layer in report["layers"].as_array().unwrap() {
        for salient in layer["salient"].as_array().unwrap() {
            assert_eq!(salient, 6 * 5);
        }
    }
    let parts = report["cache_parts"].as_object().unwrap();
    let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert!(sum > 0);
    assert_eq!(report["cache_bytes"], sum);
}
