//! `still export`: one quantized file that every command takes.

use crate::common::{Outcome, linearize_args, still, student_dir, teacher_dir, words};

#[test]
fn an_exported_student_is_a_model_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("student.gguf");
    let export = |model: &std::path::Path, more: &[&str]| {
        let mut command = still();
        command.args(["export", "--gguf", "q8_0", "--model"]).arg(model);
        Outcome::of(command.arg("--out").arg(&out).args(more))
    };
    let exported = export(student_dir(), &["--json"]);
    exported.succeeded();
    let report = exported.json();
    assert_eq!(report["bytes"], out.metadata().unwrap().len());
    assert!(report["matrices"]["Q8_0"].as_u64() > Some(0), "{report}");
    let generated = Outcome::of(
        still().args(["generate", "--prompt", "The sea", "-n", "4", "--model"]).arg(&out),
    );
    generated.succeeded();
    assert!(generated.stderr.contains("STILL attention"), "{}", generated.stderr);

    export(student_dir(), &[]).failed_with("exists already");
    export(student_dir(), &["--overwrite"]).succeeded();
    // A file that is there stays if the new one cannot be made.
    let before = std::fs::read(&out).unwrap();
    export(teacher_dir(), &["--overwrite"]).failed_with("not a student");
    assert!(std::fs::read(&out).unwrap() == before);
}

#[test]
fn a_folder_for_transformers_is_a_student_with_a_card() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("shared-student");
    let export = |model: &std::path::Path, more: &[&str]| {
        let mut command = still();
        command.args(["export", "--transformers"]).arg(&out).arg("--model").arg(model);
        Outcome::of(command.args(more))
    };
    let exported = export(student_dir(), &["--json", "--license", "apache-2.0", "--dtype", "f32"]);
    exported.succeeded();
    let bytes = out.join("model.safetensors").metadata().unwrap().len();
    assert_eq!(exported.json()["bytes"], bytes);
    for missing in ["--base", "--data", "--results"] {
        assert!(exported.stderr.contains(missing), "{missing}: {}", exported.stderr);
    }
    assert!(!exported.stderr.contains("--license"), "{}", exported.stderr);
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    for said in [
        "license: \"apache-2.0\"",
        "# shared-student",
        "from_pretrained(\"shared-student\", trust_remote_code=True)",
        "| license of the base | apache-2.0 |",
        "| base model | not stated |",
    ] {
        assert!(card.contains(said), "{said}: {card}");
    }
    // The folder is a student like any other, and says what the other says.
    let generate = |model: &std::path::Path| {
        let mut command = still();
        let outcome = Outcome::of(
            command.args(["generate", "--prompt", "The sea", "-n", "8", "--model"]).arg(model),
        );
        outcome.succeeded();
        outcome.stdout
    };
    assert_eq!(generate(&out), generate(student_dir()));

    export(student_dir(), &[]).failed_with("exists already");
    export(student_dir(), &["--overwrite", "--base", "org/name"]).succeeded();
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("base_model: \"org/name\""), "{card}");
    export(&out, &["--overwrite"]).failed_with("is the student itself");
    export(teacher_dir(), &["--overwrite"]).failed_with("not a student");
    assert!(out.join("README.md").exists());
    export(student_dir(), &["--gguf", "q8_0"]).failed_with("cannot be used with");
}

#[test]
fn a_quantized_student_and_a_delta_become_folders() {
    let dir = tempfile::tempdir().unwrap();
    let quantized = dir.path().join("student.gguf");
    Outcome::of(
        still()
            .args(["export", "--gguf", "q8_0", "--model"])
            .arg(student_dir())
            .arg("--out")
            .arg(&quantized),
    )
    .succeeded();
    let folder = dir.path().join("folder");
    Outcome::of(
        still().args(["export", "--transformers"]).arg(&folder).arg("--model").arg(&quantized),
    )
    .succeeded();
    let generated = Outcome::of(
        still().args(["generate", "--prompt", "The sea", "-n", "4", "--model"]).arg(&folder),
    );
    generated.succeeded();
    assert!(generated.stderr.contains("STILL attention"), "{}", generated.stderr);
}

/// A delta in fewer bits: the same student to every command.
#[test]
fn a_delta_in_bf16_is_half_as_large() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    std::fs::write(&data, words(2000)).unwrap();
    let wide = dir.path().join("wide");
    let mut linearize = still();
    linearize.args(linearize_args(teacher_dir(), &data, &wide)).arg("--delta");
    for set in ["data.length=128", "transfer.steps=1", "finetune.steps=1"] {
        linearize.args(["--set", set]);
    }
    Outcome::of(&mut linearize).succeeded();
    let narrow = dir.path().join("narrow");
    let export = |model: &std::path::Path, more: &[&str]| {
        let mut command = still();
        command.args(["export", "--delta"]).arg(&narrow).arg("--model").arg(model);
        Outcome::of(command.args(more))
    };
    let exported = export(&wide, &["--json"]);
    exported.succeeded();
    let size = |dir: &std::path::Path| dir.join("student.safetensors").metadata().unwrap().len();
    assert_eq!(exported.json()["bytes"], size(&narrow));
    assert_eq!(exported.json()["dtype"], "bf16");
    // Headers and vectors are as they were.
    assert!(size(&narrow) < size(&wide) * 7 / 10, "{} and {}", size(&narrow), size(&wide));
    let generated = Outcome::of(
        still().args(["generate", "--prompt", "The sea", "-n", "4", "--model"]).arg(&narrow),
    );
    generated.succeeded();
    assert!(generated.stderr.contains("STILL attention"), "{}", generated.stderr);
    export(&wide, &[]).failed_with("exists already");
    export(&wide, &["--overwrite", "--dtype", "f32"]).succeeded();
    assert_eq!(size(&narrow), size(&wide));
    let budgets = dir.path().join("budgets.json");
    Outcome::of(
        still()
            .args(["calibrate", "--cache-fraction", "0.9", "--at-length", "4096", "--keys", "0"])
            .args(["--window", "512", "--model"])
            .arg(teacher_dir())
            .arg("--data")
            .arg(&data)
            .arg("--out")
            .arg(&budgets),
    )
    .succeeded();
    let read = |path: &std::path::Path| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let config = || read(&narrow.join("config.json"))["still"].clone();
    assert_eq!(config().get("key_exponents"), None);
    let named = ["--overwrite", "--key-exponents", budgets.to_str().unwrap()];
    export(&wide, &named).succeeded();
    let found = read(&budgets)["key_exponents"].clone();
    assert!(found[0][0].is_string());
    assert_eq!(config()["key_exponents"], found);
    let mut earlier = read(&budgets);
    earlier.as_object_mut().unwrap().remove("key_exponents");
    std::fs::write(&budgets, earlier.to_string()).unwrap();
    export(&wide, &named).failed_with("has no key exponents");
    export(&narrow, &["--overwrite"]).failed_with("is the student itself");
    export(student_dir(), &["--overwrite"]).failed_with("no difference to write");
    export(&wide, &["--gguf", "q8_0"]).failed_with("cannot be used with");
}
