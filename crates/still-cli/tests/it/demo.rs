//! `still demo` on a small random model: the whole path, end to end.

use crate::common::{Outcome, still, teacher_dir};

fn demo(extra: &[&str]) -> Outcome {
    Outcome::of(
        still()
            .args(["demo", "--transfer-steps", "2", "--finetune-steps", "1", "--windows", "1"])
            .args(["--keys", "1", "--decode-steps", "2", "--model"])
            .arg(teacher_dir())
            .args(extra),
    )
}

#[test]
fn json_has_the_five_rows_and_their_numbers() {
    let outcome = demo(&["--json"]);
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
    let outcome = demo(&["--out", out.to_str().unwrap()]);
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
