//! `still demo` on a small random model: the whole path, end to end.

use std::path::Path;

use crate::common::{Outcome, save_delta, still, student_dir, teacher_dir};

fn demo(extra: &[&str]) -> Outcome {
    Outcome::of(
        still()
            .args(["demo", "--train", "--transfer-steps", "2", "--finetune-steps", "1"])
            .args(["--windows", "1"])
            .args(["--keys", "1", "--decode-steps", "2", "--model"])
            .arg(teacher_dir())
            .args(extra),
    )
}

#[test]
fn json_has_the_five_rows_and_their_numbers() {
    let outcome = demo(&["--json", "--full"]);
    outcome.succeeded();
    let report = outcome.json();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["model"].as_str().unwrap()).collect();
    assert_eq!(names, ["teacher", "untrained", "stage1", "stage2", "window_only"]);
    for row in rows {
        for key in ["ppl_1k", "ppl_4k", "decode_tokens_per_s_1k", "decode_tokens_per_s_4k"] {
            let value = row[key].as_f64().unwrap();
            assert!(value.is_finite() && value > 0.0, "{key} of {row}");
        }
        assert!((0.0..=1.0).contains(&row["passkey_4k"].as_f64().unwrap()));
        assert!(row["cache_bytes_4k"].as_u64().unwrap() > 0);
    }
    let bytes = |row: usize, key: &str| rows[row][key].as_u64().unwrap();
    // 2 layers, 2 heads of 8 channels, K and V, 2 bytes each.
    assert_eq!(bytes(0, "cache_bytes_4k"), 4096 * 2 * 2 * 8 * 2 * 2);
    assert_eq!(bytes(0, "cache_bytes_1k"), 1024 * 2 * 2 * 8 * 2 * 2);
    assert!(bytes(4, "cache_bytes_4k") < bytes(3, "cache_bytes_4k"), "the window alone is smaller");
    assert!(report["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(report["samples"].as_array().unwrap().len(), 4);
    assert_eq!(report["setting"]["stage1_tokens"], 2 * 1024);
}

#[test]
fn the_table_and_the_kept_student() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("student");
    let outcome = demo(&["--full", "--out", out.to_str().unwrap()]);
    outcome.succeeded();
    for words in ["teacher", "student, untrained", "student, stage 2", "window only", "ppl 4k"] {
        assert!(outcome.stdout.contains(words), "no {words:?} in: {}", outcome.stdout);
    }
    let reply = Outcome::of(
        still()
            .args(["generate", "--max-new-tokens", "4", "--prompt", "The sea", "--model"])
            .arg(&out),
    );
    reply.succeeded();
}

#[test]
fn without_full_no_window_only_student_is_trained() {
    let outcome = demo(&["--json"]);
    outcome.succeeded();
    let report = outcome.json();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["model"].as_str().unwrap()).collect();
    assert_eq!(names, ["teacher", "untrained", "stage1", "stage2"]);
    assert!(report.get("stage2_minus_window_only_4k").is_none());
}

fn compared(student: &Path, extra: &[&str]) -> Outcome {
    Outcome::of(still().args(["demo", "--model"]).arg(student).args(extra))
}

/// A delta of a teacher in a fresh directory.
fn delta() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    save_delta(teacher_dir(), &dir.path().join("delta"));
    dir
}

#[test]
fn a_student_is_compared_with_its_teacher() {
    let dir = delta();
    let student = dir.path().join("delta");
    let outcome = compared(&student, &["--json"]);
    outcome.succeeded();
    let report = outcome.json();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!((&rows[0]["model"], &rows[1]["model"]), (&"teacher".into(), &"student".into()));
    for row in rows {
        for key in ["prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
        assert_eq!(row["recall"][0]["of"], 10);
        assert!(row.get("perplexity").is_none(), "{row}");
    }
    let tokens = report["setting"]["context"].as_u64().unwrap();
    // 2 layers, 2 heads of 8 channels, K and V, 2 bytes each; the cache has room to grow into.
    let dense = tokens * 2 * 2 * 8 * 2 * 2;
    assert!(rows[0]["cache_bytes"].as_u64().unwrap() >= dense);
    assert!(rows[1]["cache_bytes"].as_u64().unwrap() < dense);
    assert_eq!(report["facts"].as_array().unwrap().len(), 10);
    assert!(report["facts"][0]["student"]["right"].is_boolean());
    assert!(report["open"][0]["teacher"]["answer"].is_string());
    assert!(report["sentence"].as_str().unwrap().contains("of 10 planted facts"));

    let table = compared(&student, &["--full"]);
    table.succeeded();
    for words in ["teacher", "planted facts in", "held-out perplexity", "pass keys in", "Next:"] {
        assert!(table.stdout.contains(words), "no {words:?} in: {}", table.stdout);
    }
    // The name of the student is as long as the test's directory.
    let lines = table.stdout.lines().filter(|line| !line.contains("--model"));
    for line in lines {
        assert!(line.chars().count() <= 80, "{line}");
    }
}

#[test]
fn what_has_no_teacher_with_it_is_refused() {
    compared(teacher_dir(), &[]).failed_with("is not a student");
    compared(student_dir(), &[]).failed_with("has no teacher with it");
    let outcome = Outcome::of(still().args(["demo", "--transfer-steps", "2"]));
    outcome.failed_with("--train");
}
