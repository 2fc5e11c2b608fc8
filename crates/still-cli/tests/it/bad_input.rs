//! Bad input gets one clear line and a hint, exit code 1, and never a panic or a half-written output.

use std::fs;
use std::path::Path;

use crate::common::{Outcome, linearize_args, linearize_by, still, student_dir, teacher_dir};

fn generate(model: &Path) -> Outcome {
    Outcome::of(still().args(["generate", "--prompt", "hello", "--model"]).arg(model))
}

/// A copy of the tiny teacher that a test may damage.
fn damaged(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    crate::common::copy_dir(teacher_dir(), dir.path());
    change(dir.path());
    dir
}

fn edit_config(dir: &Path, key: &str, value: serde_json::Value) {
    let path = dir.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_missing_model() {
    generate(Path::new("/no/such/model")).failed_with("/no/such/model");
    generate(Path::new("/no/such/model.gguf")).failed_with("/no/such/model.gguf");
}

#[test]
fn a_device_that_is_not_there() {
    let on = |device: &[&str]| {
        let model = ["generate", "--prompt", "hello", "--model"];
        Outcome::of(still().args(model).arg(teacher_dir()).args(device))
    };
    on(&["--device", "gpu"]).failed_with("\"gpu\"");
    on(&["--compute-dtype", "bf16"]).failed_with("bf16");
    on(&["--weights", "fp8"]).failed_with("weights in fp8 on the CPU");
    on(&["--weights", "q5_0"]).failed_with("invalid value 'q5_0'");
    #[cfg(not(feature = "cuda"))]
    on(&["--device", "cuda"]).failed_with("without CUDA");
}

#[test]
fn a_directory_without_a_config() {
    let dir = tempfile::tempdir().unwrap();
    generate(dir.path()).failed_with("config.json");
}

#[test]
fn a_config_that_is_not_json() {
    let dir = damaged(|dir| fs::write(dir.join("config.json"), "{ not json").unwrap());
    generate(dir.path()).failed_with("config.json");
}

#[test]
fn truncated_weights() {
    let dir = damaged(|dir| {
        let path = dir.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    });
    generate(dir.path()).failed_with("model.safetensors");
}

#[test]
fn weights_that_are_no_safetensors() {
    let dir = damaged(|dir| fs::write(dir.join("model.safetensors"), [0xff; 4096]).unwrap());
    generate(dir.path()).failed_with("model.safetensors");
    let dir = damaged(|dir| fs::write(dir.join("model.safetensors"), "").unwrap());
    generate(dir.path()).failed_with("model.safetensors");
}

#[test]
fn missing_weights() {
    let dir = damaged(|dir| fs::remove_file(dir.join("model.safetensors")).unwrap());
    generate(dir.path()).failed_with("safetensors");
}

#[test]
fn an_unsupported_architecture_is_named() {
    let dir = damaged(|dir| {
        edit_config(dir, "model_type", "mamba".into());
        edit_config(dir, "architectures", serde_json::json!(["MambaForCausalLM"]));
    });
    generate(dir.path()).failed_with("mamba");
}

#[test]
fn head_counts_that_do_not_divide() {
    let dir = damaged(|dir| edit_config(dir, "num_key_value_heads", 3.into()));
    generate(dir.path()).failed_with("3");
}

#[test]
fn a_corrupt_gguf() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [
        ("empty.gguf", vec![]),
        ("garbage.gguf", vec![0xab; 1000]),
        (
            "header.gguf",
            b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x7f"
                .to_vec(),
        ),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        generate(&path).failed_with(name);
    }
}

#[test]
fn sampling_options_out_of_range() {
    for options in [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-k", "0"],
        ["--top-p", "1.5"],
        ["--stop", ""],
    ] {
        Outcome::of(
            still()
                .args(["generate", "--prompt", "hello", "--model"])
                .arg(teacher_dir())
                .arg(options.join("=")),
        )
        .failed_with(options[0]);
    }
}

#[test]
fn prompts_that_are_missing_empty_or_not_text() {
    let dir = tempfile::tempdir().unwrap();
    let generate = |file: &Path| {
        Outcome::of(
            still().args(["generate", "--model"]).arg(teacher_dir()).arg("--prompt-file").arg(file),
        )
    };
    generate(&dir.path().join("missing.txt")).failed_with("missing.txt");
    generate(dir.path()).failed_with("cannot read");
    let path = dir.path().join("latin1.txt");
    fs::write(&path, [0x66, 0xfc, 0x72]).unwrap();
    generate(&path).failed_with("latin1.txt");
}

/// `still linearize` with one data file; `out` must not appear.
fn linearize(data: &str, extra: &[&str]) -> Outcome {
    linearize_file("data.txt", data.as_bytes(), extra)
}

fn linearize_file(name: &str, data: &[u8], extra: &[&str]) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    fs::write(&file, data).unwrap();
    let out = dir.path().join("student");
    let outcome = Outcome::of(
        still()
            .env("STILL_CACHE", dir.path().join("cache"))
            .args(linearize_args(teacher_dir(), &file, &out))
            .args(extra),
    );
    assert!(!out.exists(), "a failed run left an output behind");
    outcome
}

#[test]
fn empty_and_tiny_data() {
    linearize("", &[]).failed_with("data.txt");
    linearize("Only a few words.", &[]).failed_with("token");
}

#[test]
fn data_that_is_malformed_names_file_and_line() {
    let text = b"{\"text\": \"the open sea\"}\n{\"txt\": 1}\n";
    linearize_file("a.jsonl", text, &[]).failed_with("line 2");
    let chat = b"{\"messages\": [{\"role\": \"user\"}]}\n";
    linearize_file("a.jsonl", chat, &[]).failed_with("line 1");
    linearize_file("a.jsonl.zst", b"not zstd", &[]).failed_with("a.jsonl.zst");
    linearize_file("a.bin", b"not tokens", &[]).failed_with("a.bin");
    let unknown = linearize_file("a.csv", b"a,b", &[]);
    unknown.failed_with("unknown kind of file");
    assert!(!unknown.stderr.contains("Loading"), "{}", unknown.stderr);
}

#[test]
fn data_that_does_not_fit_its_recipe() {
    let text = crate::common::words(400);
    linearize(&text, &["--set", "data.weights=[1, 2]"]).failed_with("data.weights has 2 values");
    linearize(&text, &["--set", "data.heldout=0.1"]).failed_with("held out");
    linearize(&text, &["--set", "data.heldout_files=[\"/no/such/file.txt\"]"])
        .failed_with("/no/such/file.txt");
    linearize(&text, &["--set", "data.lengths=[64, 4096, 8192]"]).failed_with("8192 tokens");
    linearize(&text, &["--set", "data.lengths=[4096, 64]"]).failed_with("data.lengths");
    linearize(&text, &["--set", "data.text_field=body", "--set", "data.lenght=64"])
        .failed_with("data.lenght");
}

#[test]
fn unknown_recipe_keys_name_the_nearest() {
    let outcome = linearize("text", &["--set", "transfer.stepz=3"]);
    outcome.failed_with("transfer.stepz");
    assert!(outcome.stderr.contains("\"transfer.steps\""), "{}", outcome.stderr);
    linearize("text", &["--set", "transfer.steps"]).failed_with("transfer.steps");
}

#[test]
fn recipes_that_are_missing_or_broken() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, "text").unwrap();
    let linearize = |recipe: &Path| {
        let out = dir.path().join("student");
        Outcome::of(still().args(linearize_by(recipe, teacher_dir(), &data, &out)))
    };
    linearize("/no/such/recipe.toml".as_ref()).failed_with("/no/such/recipe.toml");
    let unknown = linearize("slow".as_ref());
    unknown.failed_with("no file slow, and no recipe of this name");
    assert!(unknown.stderr.contains("quick, still-long"), "{}", unknown.stderr);
    let path = dir.path().join("recipe.toml");
    fs::write(&path, "[transfer\nsteps = 1").unwrap();
    linearize(&path).failed_with("recipe");
}

#[test]
fn an_existing_output_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("student");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "kept").unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, "text").unwrap();
    Outcome::of(still().args(linearize_args(teacher_dir(), &data, &out)))
        .failed_with("exists already");
    assert_eq!(fs::read_to_string(out.join("precious")).unwrap(), "kept");
}

#[test]
fn a_student_cannot_be_linearized_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, "text").unwrap();
    let out = dir.path().join("student");
    Outcome::of(still().args(linearize_args(student_dir(), &data, &out)))
        .failed_with("student already");
}

#[test]
fn inspect_refuses_what_it_cannot_read_or_write() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    fs::write(&text, "some text").unwrap();
    let inspect = |text: &Path, extra: &[&str]| {
        Outcome::of(
            still()
                .args(["inspect", "--model"])
                .arg(teacher_dir())
                .arg("--text")
                .arg(text)
                .args(extra),
        )
    };
    inspect(&dir.path().join("missing.txt"), &[]).failed_with("missing.txt");
    inspect(&text, &["--budget", "65"]).failed_with("--budget 65");
    inspect(&text, &["--max-tokens", "0"]).failed_with("no tokens");
    inspect(&text, &["--html", "/no/such/directory/page.html"]).failed_with("/no/such/directory");
    inspect(&text, &["--html", dir.path().to_str().unwrap()]).failed_with("is a directory");
}

#[test]
fn demo_options_out_of_range() {
    let demo = |extra: [&str; 2]| {
        Outcome::of(still().args(["demo", "--train", "--model"]).arg(teacher_dir()).args(extra))
    };
    demo(["--windows", "100000"]).failed_with("--windows 100000");
    demo(["--transfer-steps", "0"]).failed_with("--transfer-steps 0");
    demo(["--keys", "0"]).failed_with("--keys 0");
}

#[test]
fn quiet_still_tells_errors() {
    let outcome =
        Outcome::of(still().args(["--quiet", "generate", "--prompt", "x", "--model", "/no/such"]));
    outcome.failed_with("/no/such");
    assert_eq!(outcome.stderr.lines().count(), 2, "{}", outcome.stderr);
}

/// A full disk, played by a limit on the size of any file that is written.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, "the quick brown fox ".repeat(40)).unwrap();
    let run = |limit: &str, out: &str| {
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" \"$@\"");
        let mut shell = assert_cmd::Command::new("sh");
        let out = dir.path().join(out);
        shell.args(["-c", &script, crate::common::BINARY]);
        shell.args(linearize_args(teacher_dir(), &data, &out));
        shell.env("STILL_CACHE", dir.path().join("cache"));
        shell.args(["--set", "transfer.steps=1", "--set", "finetune.steps=1"]);
        Outcome::of(&mut shell)
    };
    // In the first checkpoint, then (with room for checkpoints alone) in the student itself.
    run("4", "first").failed_with("cannot write");
    run("100", "second").failed_with("cannot write");
    assert!(!dir.path().join("first").exists() && !dir.path().join("second").exists());
    let left: Vec<String> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "half-written: {left:?}");
}

#[test]
fn a_hub_id_without_a_network_fails_fast() {
    let started = std::time::Instant::now();
    let mut command = still();
    // Nothing listens there: the same as no network, wherever the test runs.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", "/nonexistent/hub");
    let outcome = Outcome::of(command.args([
        "generate",
        "--prompt",
        "x",
        "--model",
        "no-such-owner/no-such-model",
    ]));
    outcome.failed_with("no-such-owner/no-such-model");
    assert!(started.elapsed().as_secs() < 20);
}
