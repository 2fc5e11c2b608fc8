//! `still generate` on a small random model, and who cannot chat.

use candle_core::DType;
use serde_json::Value;
use still_model::random::{random_model, save_base, tiny_config};

use crate::common::{Outcome, chat_dir, still, student_dir, teacher_dir};

fn generate(model: &std::path::Path, extra: &[&str]) -> Outcome {
    Outcome::of(
        still().args(["generate", "--max-new-tokens", "12", "--model"]).arg(model).args(extra),
    )
}

#[test]
fn greedy_text_repeats_for_teacher_and_student() {
    for model in [teacher_dir(), student_dir()] {
        let (a, b) = (
            generate(model, &["--prompt", "The sea is"]),
            generate(model, &["--prompt", "The sea is"]),
        );
        a.succeeded();
        assert_eq!(a.stdout, b.stdout);
        assert!(a.stderr.contains("tokens read"), "{}", a.stderr);
    }
}

#[test]
fn a_seed_repeats_samples() {
    let sample = |seed| {
        let options = ["--prompt", "The sea", "--temperature", "1.5", "--seed", seed, "--json"];
        let outcome = generate(student_dir(), &options);
        outcome.succeeded();
        outcome.json()["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn the_prompt_may_come_from_stdin_or_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "The sea is").unwrap();
    let direct = generate(student_dir(), &["--prompt", "The sea is"]);
    let from_file = generate(student_dir(), &["--prompt-file", file.to_str().unwrap()]);
    let piped = Outcome::of(
        still()
            .args(["generate", "--max-new-tokens", "12", "--model"])
            .arg(student_dir())
            .write_stdin("The sea is"),
    );
    piped.succeeded();
    assert_eq!(direct.stdout, from_file.stdout);
    assert_eq!(direct.stdout, piped.stdout);
}

#[test]
fn json_is_one_object_and_nothing_else_on_stdout() {
    let outcome = generate(student_dir(), &["--prompt", "The sea is", "--json"]);
    outcome.succeeded();
    let report = outcome.json();
    assert_eq!(report["finish"], "length");
    assert_eq!(report["new_tokens"], 12);
    assert!(report["cache_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn quiet_says_only_the_result() {
    let outcome = generate(student_dir(), &["--prompt", "The sea is", "--quiet"]);
    outcome.succeeded();
    assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
}

#[test]
fn weights_are_kept_as_asked() {
    for (format, name) in [("q8_0", "in q8_0"), ("dense", "in f32")] {
        let outcome = generate(student_dir(), &["--prompt", "The sea is", "--weights", format]);
        outcome.succeeded();
        assert!(outcome.stderr.contains(name), "{}", outcome.stderr);
    }
}

#[test]
fn a_prompt_beyond_the_models_range_warns_and_runs() {
    let outcome = generate(student_dir(), &["--prompt", &crate::common::words(3000)]);
    outcome.succeeded();
    assert!(outcome.stderr.contains("warning:"), "{}", outcome.stderr);
}

#[test]
fn chat_needs_a_template() {
    let dir = chat_dir("unused");
    let student = dir.path().join("student");
    std::fs::write(student.join("tokenizer_config.json"), "{}").unwrap();
    Outcome::of(still().args(["chat", "--model"]).arg(student).write_stdin("hello\n"))
        .failed_with("chat template");
}

#[cfg(feature = "serve")]
#[test]
fn a_text_follows_a_schema_or_a_grammar() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    save_base(&model, &random_model(tiny_config(), 7).unwrap(), DType::F32).unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let schema = write(
        "schema.json",
        r#"{"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "c": {"enum": ["red", "blue"]}},
            "required": ["n", "c"], "additionalProperties": false}"#,
    );
    let of = |model: &std::path::Path, command: &str, extra: &[&str]| {
        let mut run = still();
        run.args([command, "-n", "200", "--model"]).arg(model).args(extra);
        Outcome::of(run.write_stdin("Hi"))
    };
    let sampled = ["--json-schema", &schema, "--temperature", "1.5", "--seed"];
    for seed in ["1", "2", "3"] {
        let text = of(&model, "generate", &[&sampled[..], &[seed]].concat());
        text.succeeded();
        let object: Value = serde_json::from_str(text.stdout.trim()).unwrap();
        assert!((0..=99).contains(&object["n"].as_i64().unwrap()), "{object}");
        assert!(["red", "blue"].contains(&object["c"].as_str().unwrap()), "{object}");
    }
    let grammar = write("grammar.lark", "start: \"yes\" | \"no\"");
    let text = of(&model, "generate", &["--grammar", &grammar]);
    text.succeeded();
    assert!(["yes", "no"].contains(&text.stdout.trim()), "{}", text.stdout);
    let chat = of(&model, "chat", &["--grammar", &grammar]);
    chat.succeeded();
    assert!(["yes", "no"].contains(&chat.stdout.trim()), "{}", chat.stdout);

    let failed = |extra: &[&str], words: &str| of(&model, "generate", extra).failed_with(words);
    failed(&["--grammar", &grammar, "--json-schema", &schema], "--grammar");
    failed(&["--grammar", &write("bad.lark", "start: (")], "bad.lark is refused");
    failed(&["--json-schema", &write("bad.json", "{")], "bad.json is not a JSON schema");
    failed(&["--json-schema", &write("kind.json", r#"{"type": "color"}"#)], "kind.json is refused");
    failed(&["--json-schema", "/no/such.json"], "/no/such.json");
    // Nothing would end a text of a model that has no end-of-sequence token.
    let endless = of(student_dir(), "generate", &["--grammar", &grammar]);
    endless.failed_with("no end-of-sequence token");
}
