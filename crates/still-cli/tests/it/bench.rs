//! `still bench model`, `train` and `attention`.

use crate::common::{Outcome, still, student_dir, teacher_dir};

#[test]
fn a_line_for_every_variant_and_context() {
    let outcome = Outcome::of(
        still()
            .args([
                "bench",
                "model",
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
        assert!(line["decode_max_ms"].as_f64() >= line["decode_p99_ms"].as_f64(), "{line}");
        assert!(line["cache_bytes"].as_u64().unwrap() > 0 && line["threads"] == 2, "{line}");
        assert!(line.get("peak_rss_bytes").is_some(), "{line}");
        let parts = line["cache_parts"].as_object().unwrap();
        let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(line["cache_bytes"], sum, "{line}");
        let state = parts["linear_states"].as_u64().unwrap();
        assert_eq!(state > 0, line["variant"] != "dense", "{line}");
    }
}

#[test]
fn contexts_decoded_in_turn_have_the_caches_that_they_have_alone() {
    let caches = |more: &[&str]| {
        let outcome = Outcome::of(
            still()
                .args(["bench", "model", "--json", "--contexts", "300,70", "--new-tokens", "35"])
                .args(["--variants", "still", "--model"])
                .arg(teacher_dir())
                .args(more),
        );
        outcome.succeeded();
        let lines = outcome.stdout.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(line["decode_tokens_per_s"].as_f64().unwrap() > 0.0, "{line}");
            (line["context"].as_u64().unwrap(), line["cache_bytes"].as_u64().unwrap())
        });
        lines.collect::<Vec<_>>()
    };
    let in_turn = caches(&["--in-turn"]);
    assert_eq!(in_turn, caches(&[]));
    assert!(in_turn[0].0 == 300 && in_turn[1].0 == 70 && in_turn[0].1 > in_turn[1].1);
}

#[test]
fn a_cap_bounds_the_cache() {
    let bytes = |cap: &[&str]| {
        let outcome = Outcome::of(
            still()
                .args(["bench", "model", "--json", "--contexts", "700", "--new-tokens", "1"])
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
    let run = |what: &str, args: &[&str]| {
        Outcome::of(still().args(["bench", what, "--model"]).arg(teacher_dir()).args(args))
    };
    run("model", &["--new-tokens", "0"]).failed_with("nothing to time");
    run("model", &["--batch", "0"]).failed_with("nothing to time");
    run("model", &["--contexts", "0"]).failed_with("nothing to time");
    run("model", &["--threads", "0"]).failed_with("--threads 0");
    run("model", &["--variants", "student", "--contexts", "8"]).failed_with("needs a student");
    run("train", &["--stages", "transfer", "--steps", "0"]).failed_with("--steps 0");
    run("train", &["--contexts", "0"]).failed_with("nothing to time");
    run("train", &["--stages", "pretrain"]).failed_with("invalid value 'pretrain'");
    run("model", &["--steps", "3"]).failed_with("unexpected argument '--steps'");
    Outcome::of(still().args(["bench", "train"])).failed_with("--model <MODEL>");
}

#[test]
fn training_steps_are_timed_by_stage_and_context() {
    let outcome = Outcome::of(
        still()
            .args([
                "bench",
                "train",
                "--json",
                "--stages",
                "transfer,finetune",
                "--contexts",
                "64,130",
            ])
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

/// `bench attention` on small heads.
fn operator(args: &[&str]) -> Outcome {
    let heads = ["--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--repetitions", "2"];
    Outcome::of(still().args(["bench", "attention", "--threads", "2"]).args(heads).args(args))
}

#[test]
fn the_operator_alone() {
    let outcome = operator(&["--json", "--contexts", "130,200", "--batch", "2"]);
    outcome.succeeded();
    let lines: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let named: Vec<String> = lines
        .iter()
        .map(|line| format!("{} {} {}", line["variant"], line["context"], line["pass"]))
        .map(|name| name.replace('"', ""))
        .collect();
    let expected = [
        "dense 130 forward",
        "dense 130 decode",
        "dense 200 forward",
        "dense 200 decode",
        "still 130 forward",
        "still 130 forward-backward",
        "still 130 decode",
        "still 200 forward",
        "still 200 forward-backward",
        "still 200 decode",
    ];
    assert_eq!(named, expected);
    let mut keys: Vec<&str> = lines[0].as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let documented = [
        "batch",
        "budget",
        "bytes",
        "cache_dtype",
        "calls",
        "cap",
        "compute_dtype",
        "context",
        "copied_bytes",
        "copy_gb_per_s",
        "device",
        "flop",
        "gb_per_s",
        "head_dim",
        "median_ms",
        "num_heads",
        "num_key_value_heads",
        "op",
        "p10_ms",
        "p90_ms",
        "pass",
        "product_size",
        "product_tflop_per_s",
        "repetitions",
        "share_of_copy",
        "share_of_product",
        "tflop_per_s",
        "threads",
        "variant",
    ];
    assert_eq!(keys, documented);
    for line in &lines {
        for key in ["median_ms", "p10_ms", "tflop_per_s", "gb_per_s", "share_of_product"] {
            assert!(line[key].as_f64().unwrap() > 0.0, "{key}: {line}");
        }
        for key in ["share_of_copy", "product_tflop_per_s", "copy_gb_per_s"] {
            assert!(line[key].as_f64().unwrap() > 0.0, "{key}: {line}");
        }
        assert!(line["p10_ms"].as_f64() <= line["p90_ms"].as_f64(), "{line}");
        assert_eq!(
            (&line["batch"], &line["num_heads"], &line["threads"]),
            (&2.into(), &4.into(), &2.into())
        );
        let still = line["variant"] == "still";
        assert_eq!(line["budget"].as_u64(), still.then_some(4), "{line}");
    }
    // 130 · 131 / 2 pairs of 4 · 8 operations, 4 heads, 2 sequences; Q, K, V and output of 12 heads in f32.
    assert_eq!(lines[0]["flop"], f64::from(65 * 131 * 4 * 8 * 4 * 2));
    assert_eq!(lines[0]["bytes"], f64::from(2 * 130 * 12 * 8 * 4));
    // A token in 64 retires a chunk: 64 steps of each of so many states.
    assert_eq!(lines[6]["calls"].as_u64().unwrap() % 64, 0);
}

#[test]
fn budgets_and_caps_of_the_operator() {
    let flop = |args: &[&str]| {
        let only = ["--json", "--variants", "still", "--passes", "forward", "--contexts", "520"];
        let outcome = operator(&[only.as_slice(), args].concat());
        outcome.succeeded();
        let line = outcome.json();
        (line["flop"].as_f64().unwrap(), line["cap"].as_u64())
    };
    let (usual, none) = flop(&[]);
    let (capped, cap) = flop(&["--cap", "8"]);
    assert_eq!((none, cap), (None, Some(8)));
    assert!(capped < usual && usual < flop(&["--budget", "16"]).0);
}

#[test]
fn the_operator_as_a_table() {
    let outcome = operator(&["--contexts", "70", "--variants", "still", "--cache-dtype", "int8"]);
    outcome.succeeded();
    for words in ["forward + backward", "decode step", "of product", "a copy of 256.0 MiB"] {
        assert!(outcome.stdout.contains(words), "{words}: {}", outcome.stdout);
    }
}

#[test]
fn what_the_operator_cannot_time_is_refused() {
    operator(&["--contexts", "0"]).failed_with("nothing to time");
    operator(&["--variants", "window"]).failed_with("invalid value 'window'");
    operator(&["--variants", "student"]).failed_with("invalid value 'student'");
    operator(&["--passes", "forward-backward"]).failed_with("`dense` has no pass");
    operator(&["--compute-dtype", "bf16"]).failed_with("f32 on the CPU");
    let small = ["--contexts", "70", "--passes", "forward", "--variants", "still"];
    operator(&[small.as_slice(), &["--budget", "65"]].concat()).failed_with("budget of 65");
    let heads = |args: &[&str]| Outcome::of(still().args(["bench", "attention"]).args(args));
    heads(&["--repetitions", "0"]).failed_with("--repetitions 0");
    heads(&["--heads", "3"]).failed_with("cannot share");
    heads(&["--head-dim", "0"]).failed_with("no heads");
    heads(&["--shape", "nothing"]).failed_with("no shape is called");
    // These the command line refuses by itself.
    let alone =
        Outcome::of(still().args(["bench", "model", "--shape", "smollm2-135m", "--heads", "3"]));
    alone.failed_with("unexpected argument '--heads'");
    heads(&["--model", "somewhere"]).failed_with("unexpected argument '--model'");
    heads(&["--new-tokens", "3"]).failed_with("unexpected argument '--new-tokens'");
}
