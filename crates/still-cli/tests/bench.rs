//! `still bench`.

mod common;

use common::{Outcome, still, student_dir, teacher_dir};

#[test]
fn a_line_for_every_variant_and_context() {
    let outcome = Outcome::of(
        still()
            .args([
                "bench",
                "--json",
                "--contexts",
                "70,200",
                "--new-tokens",
                "3",
                "--threads",
                "2",
            ])
            .args(["--variants", "dense,window,still,student", "--model"])
            .arg(student_dir()),
    );
    outcome.succeeded();
    let lines: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let named: Vec<(&str, u64)> = lines
        .iter()
        .map(|line| (line["variant"].as_str().unwrap(), line["context"].as_u64().unwrap()))
        .collect();
    let variants = ["dense", "window", "still", "student"];
    let expected: Vec<(&str, u64)> =
        variants.iter().flat_map(|&variant| [(variant, 70), (variant, 200)]).collect();
    assert_eq!(named, expected);
    for line in &lines {
        for key in ["prefill_tokens_per_s", "decode_tokens_per_s", "decode_p50_ms"] {
            assert!(line[key].as_f64().unwrap() > 0.0, "{key}: {line}");
        }
        assert!(line["decode_p99_ms"].as_f64() >= line["decode_p50_ms"].as_f64(), "{line}");
        assert!(line["cache_bytes"].as_u64().unwrap() > 0 && line["threads"] == 2, "{line}");
        assert!(line.get("peak_rss_bytes").is_some(), "{line}");
    }
}

#[test]
fn a_cap_bounds_the_cache() {
    let bytes = |cap: &[&str]| {
        let outcome = Outcome::of(
            still()
                .args(["bench", "--json", "--contexts", "700", "--new-tokens", "1"])
                .args(["--variants", "still", "--model"])
                .arg(teacher_dir())
                .args(cap),
        );
        outcome.succeeded();
        outcome.json()["cache_bytes"].as_u64().unwrap()
    };
    assert!(bytes(&["--cap", "8"]) < bytes(&[]));
}

#[test]
fn what_cannot_be_timed_is_refused() {
    let run = |args: &[&str]| {
        Outcome::of(still().args(["bench", "--model"]).arg(teacher_dir()).args(args))
    };
    run(&["--new-tokens", "0"]).failed_with("nothing to time");
    run(&["--contexts", "0"]).failed_with("nothing to time");
    run(&["--threads", "0"]).failed_with("--threads 0");
    run(&["--variants", "student", "--contexts", "8"]).failed_with("needs a student");
    run(&["--stages", "transfer", "--steps", "0"]).failed_with("--steps 0");
}

#[test]
fn training_steps_are_timed_by_stage_and_context() {
    let outcome = Outcome::of(
        still()
            .args(["bench", "--json", "--stages", "transfer,finetune", "--contexts", "64,130"])
            .args(["--steps", "2", "--set", "finetune.objective=cross_entropy", "--model"])
            .arg(teacher_dir()),
    );
    outcome.succeeded();
    let lines: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let order: Vec<(&str, u64)> = lines
        .iter()
        .map(|line| (line["stage"].as_str().unwrap(), line["context"].as_u64().unwrap()))
        .collect();
    assert_eq!(order, [("transfer", 64), ("transfer", 130), ("finetune", 64), ("finetune", 130)]);
    for line in &lines {
        assert!(line["step_p50_ms"].as_f64().unwrap() > 0.0, "{line}");
        assert!(line["trained_values"].as_u64().unwrap() > 0, "{line}");
        let objective = line.get("objective").and_then(serde_json::Value::as_str);
        assert_eq!(objective, (line["stage"] == "finetune").then_some("cross_entropy"), "{line}");
    }
}
