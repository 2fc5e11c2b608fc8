//! `still eval` of long-context tasks, of students with one part changed, and of branches.

use std::fs;
use std::path::Path;

use crate::common::{Outcome, still, student_dir, teacher_dir};

fn eval(model: &Path, data: &Path, arguments: &[&str]) -> Outcome {
    Outcome::of(
        still().args(["eval", "--data-dir"]).arg(data).args(arguments).arg("--model").arg(model),
    )
}

#[test]
fn long_tasks_are_asked_at_every_length() {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..99).map(|i| format!("Sentence {i} says nothing. ")).collect();
    let essay = dir.path().join("essay.txt");
    fs::write(&essay, text).unwrap();
    fs::create_dir(dir.path().join("babi")).unwrap();
    let story = "1 Mary went to the office.\n2 Where is Mary? \toffice\t1\n";
    fs::write(dir.path().join("babi/qa1_test.txt"), story.repeat(2)).unwrap();
    let run = |name: &str| {
        let results = dir.path().join(name);
        let tasks = "niah_single_1,niah_multivalue,babilong_qa1,passkey,repeated_text";
        eval(
            student_dir(),
            dir.path(),
            &[
                "--tasks",
                tasks,
                "--lengths",
                "1600,1800",
                "--limit",
                "2",
                "--text",
                essay.to_str().unwrap(),
                "--out",
                results.to_str().unwrap(),
            ],
        )
        .succeeded();
        let text = fs::read_to_string(results).unwrap();
        let mut results: serde_json::Value = serde_json::from_str(&text).unwrap();
        // But for the time it took.
        for of_the_run in ["timing", "provenance"] {
            assert!(results.as_object_mut().unwrap().remove(of_the_run).is_some());
        }
        results
    };
    let results = run("r.json");
    assert_eq!(results.to_string(), run("again.json").to_string());
    for length in [1600, 1800] {
        for task in ["niah_single_1", "niah_multivalue", "babilong_qa1", "passkey"] {
            let scores = &results["tasks"][format!("{task}_{length}")];
            assert_eq!(scores["n"], 2, "{task}: {results}");
            assert!(scores["score"].is_number(), "{task}: {scores}");
            assert_eq!(scores["length"], length, "{task}: {scores}");
        }
        let repeated = &results["tasks"][format!("repeated_text_{length}")];
        assert!(repeated["perplexity"].as_f64().unwrap() > 1.0, "{repeated}");
    }
}

#[test]
fn what_a_long_task_lacks_is_said() {
    let dir = tempfile::tempdir().unwrap();
    // Before a model is loaded, let alone asked the first task.
    let nowhere = dir.path().join("nowhere");
    eval(&nowhere, dir.path(), &["--tasks", "vt,ruler_qa_hotpot"])
        .failed_with("qa_2 needs HotpotQA's");
    let eval = |arguments: &[&str]| eval(teacher_dir(), dir.path(), arguments);
    eval(&["--tasks", "niah_single_2"]).failed_with("niah_single_2 needs a plain text");
    eval(&["--tasks", "ruler_qa_hotpot"]).failed_with("qa_2 needs HotpotQA's");
    eval(&["--tasks", "vt", "--lengths", "200"]).failed_with("tokens, 200 are there");
    eval(&["--tasks", "piqa", "--chat"]).failed_with("--chat is of the long-context tasks");
}

#[test]
fn parts_are_changed_in_every_combination() {
    let dir = tempfile::tempdir().unwrap();
    let (text, results) = (dir.path().join("text.txt"), dir.path().join("r.json"));
    fs::write(&text, "The sea was calm, and nobody on the shore looked at it. ".repeat(12))
        .unwrap();
    let (text, out) = (text.to_str().unwrap(), results.to_str().unwrap());
    let tasks = ["--tasks", "perplexity", "--lengths", "200", "--text", text, "--out", out];
    let crossed = ["--ablate", "branches+router"];
    let outcome = eval(student_dir(), dir.path(), &[tasks.as_slice(), &crossed].concat());
    outcome.succeeded();
    let file: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&results).unwrap()).unwrap();
    let (asked, skipped) =
        (file["compare"].as_array().unwrap(), file["skipped"].as_array().unwrap());
    assert_eq!((asked.len(), asked.len() + skipped.len()), (8, 5 * 4), "{file}");
    for variant in asked {
        let name = variant["ablation"].as_str().unwrap();
        assert!(name.starts_with("branches: ") && name.contains(", router: "), "{name}");
        assert!(outcome.stdout.contains(&format!("[{name}]")), "{name}: {}", outcome.stdout);
    }
    for left_out in skipped {
        let name = left_out["ablation"].as_str().unwrap();
        let said = match (left_out["same_as"].as_str(), left_out["impossible"].as_str()) {
            (Some(other), None) => format!("Skipped {name}: the same as {other}"),
            (None, why) => format!("Skipped {name}: {}", why.unwrap()),
            both => panic!("{both:?}"),
        };
        assert!(outcome.stderr.contains(&said), "no {said:?} in: {}", outcome.stderr);
    }
}

#[test]
fn a_student_is_taken_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (text, results) = (dir.path().join("text.txt"), dir.path().join("r.json"));
    fs::write(&text, "The sea was calm, and nobody on the shore looked at it. ".repeat(12))
        .unwrap();
    let (text, out) = (text.to_str().unwrap(), results.to_str().unwrap());
    let tasks = ["--tasks", "perplexity", "--lengths", "300", "--text", text];
    let apart = ["--ablate", "branches,linear_norm", "--branches"];
    let ask = |model: &Path, more: &[&str]| {
        eval(model, dir.path(), &[&tasks, apart.as_slice(), more].concat())
    };
    let outcome = ask(student_dir(), &["--out", out]);
    outcome.succeeded();
    for words in ["[branches: window]", "[branches: linear]", "[linear_norm: sum]", "% of mass"] {
        assert!(outcome.stdout.contains(words), "no {words:?} in: {}", outcome.stdout);
    }
    let results: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(results).unwrap()).unwrap();
    let variants = results["compare"].as_array().unwrap();
    assert_eq!(variants.len(), 5, "{results}");
    for variant in variants {
        let perplexity = &variant["tasks"]["perplexity_300"]["perplexity"];
        assert!(perplexity.as_f64().unwrap() > 1.0, "{variant}");
        assert!(variant["difference"]["perplexity_300"]["nll"]["low"].is_number(), "{variant}");
    }
    for layer in results["branches"].as_array().unwrap() {
        let sum: f64 = (0..3).map(|part| layer["mass"][part].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{layer}");
    }
    ask(teacher_dir(), &[]).failed_with("a teacher");
    for (wrong, words) in [("rooter", "unknown ablation"), ("cap+cap", "cap stands twice")] {
        eval(student_dir(), dir.path(), &["--tasks", "vt", "--ablate", wrong]).failed_with(words);
    }
}

#[test]
fn dense_models_are_asked_with_a_compressed_cache_too() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("r.json");
    let tasks = ["--tasks", "passkey", "--lengths", "600", "--limit", "2"];
    let compress = ["--compress", "snapkv:0.1,kvzip:0.25"];
    let out = ["--out", results.to_str().unwrap()];
    let outcome = eval(teacher_dir(), dir.path(), &[&tasks[..], &compress, &out].concat());
    outcome.succeeded();
    let file: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&results).unwrap()).unwrap();
    let compared = file["compare"].as_array().unwrap();
    let dense = file["tasks"]["passkey_600"]["cache_bytes"].as_f64().unwrap();
    let expected = [("snapkv", 0.1, true, 0.2), ("kvzip", 0.25, false, 0.4)];
    assert_eq!(compared.len(), expected.len(), "{file}");
    for (asked, (method, fraction, sees_question, most)) in compared.iter().zip(expected) {
        let compression = &asked["compression"];
        assert_eq!(compression["method"], method, "{asked}");
        assert_eq!(compression["fraction"], fraction, "{asked}");
        assert_eq!(compression["sees_question"], sees_question, "{asked}");
        let bytes = asked["tasks"]["passkey_600"]["cache_bytes"].as_f64().unwrap();
        assert!(bytes < most * dense, "{bytes} of {dense}");
    }
    // Whoever reads the table must know which method knew the question.
    assert!(outcome.stdout.contains("[snapkv:0.1, sees the question]"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("[kvzip:0.25]"), "{}", outcome.stdout);
    for (wrong, words) in [
        ("pyramid:0.1", "no compression is called"),
        ("h2o:0", "no share of a cache"),
        ("h2o", "no METHOD:FRACTION"),
    ] {
        eval(teacher_dir(), dir.path(), &["--tasks", "passkey", "--compress", wrong])
            .failed_with(words);
    }
    eval(student_dir(), dir.path(), &["--tasks", "passkey", "--compress", "h2o:0.1"])
        .failed_with("only students are asked");
}
