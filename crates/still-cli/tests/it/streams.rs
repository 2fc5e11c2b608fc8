//! Standard streams that are gone or full, and text of others on a terminal.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{
    BINARY, Outcome, linearize_args, linearize_by, still, student_dir, teacher_dir, words,
};

/// `still`, with no settings of the person who runs the tests.
fn command() -> Command {
    let mut command = Command::new(BINARY);
    command.env_remove("NO_COLOR").env_remove("STILL_CACHE").env("HF_HUB_OFFLINE", "1");
    command.stdin(Stdio::null());
    command
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reader is gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[track_caller]
fn code(command: &mut Command) -> i32 {
    command.status().unwrap().code().expect("ended by a signal")
}

#[test]
fn no_run_needs_a_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.txt");
    fs::write(&data, words(600)).unwrap();
    for (n, stderr) in [full, closed].into_iter().enumerate() {
        let mut generate = command();
        generate.args(["generate", "-n", "2", "--prompt", "x", "--model"]).arg(student_dir());
        assert_eq!(code(generate.stdout(Stdio::null()).stderr(stderr())), 0);

        let mut missing = command();
        missing.args(["generate", "--model", "/no/such"]);
        assert_eq!(code(missing.stdout(Stdio::null()).stderr(stderr())), 1);
        assert_eq!(code(command().arg("--no-such-option").stderr(stderr())), 1);

        let out = dir.path().join(format!("student{n}"));
        let mut linearize = command();
        linearize.args(linearize_args(teacher_dir(), &data, &out)).arg("-vv");
        linearize.env("STILL_CACHE", dir.path().join("cache"));
        for set in ["data.length=128", "transfer.steps=2", "finetune.steps=1", "evaluation.every=1"]
        {
            linearize.args(["--set", set]);
        }
        linearize.args(["--set", "evaluation.windows=0", "--set", "evaluation.repeated_text=16"]);
        assert_eq!(code(linearize.stdout(Stdio::null()).stderr(stderr())), 0);
        assert!(out.join("config.json").is_file());

        let mut eval = command();
        eval.args([
            "eval",
            "--tasks",
            "repeated_text",
            "--lengths",
            "64",
            "--limit",
            "1",
            "--model",
        ]);
        assert_eq!(code(eval.arg(student_dir()).stdout(Stdio::null()).stderr(stderr())), 0);
    }
}

/// Whoever closes stdout has read enough; a full one is an error.
#[test]
fn stdout_may_be_closed_and_not_full() {
    let student = student_dir().to_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    fs::write(&text, words(100)).unwrap();
    let text = text.to_str().unwrap();
    for arguments in [
        vec!["--help"],
        vec!["--version"],
        vec!["linearize", "--help"],
        vec!["doctor"],
        vec!["doctor", "--json"],
        vec!["generate", "--model", student, "--prompt", "x", "-n", "2"],
        vec!["generate", "--model", student, "--prompt", "x", "-n", "2", "--json"],
        vec!["inspect", "--model", student, "--text", text],
        vec![
            "eval",
            "--model",
            student,
            "--tasks",
            "repeated_text",
            "--lengths",
            "64",
            "--limit",
            "1",
        ],
    ] {
        let run = |stdout: Stdio| {
            let output = command().args(&arguments).stdout(stdout).stderr(Stdio::piped()).output();
            let output = output.unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (code, stderr) = run(closed());
        assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("error:"), "{arguments:?}: {stderr}");
        let (code, stderr) = run(full());
        assert_eq!(code, Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains("error: cannot write standard output"), "{arguments:?}: {stderr}");
        assert!(stderr.lines().last().unwrap().starts_with("hint: "), "{arguments:?}: {stderr}");
    }
}

/// Results are in their file before anybody reads the table.
#[test]
fn a_closed_stdout_costs_no_results() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("results.json");
    let mut eval = command();
    eval.args(["eval", "--tasks", "repeated_text", "--lengths", "64", "--limit", "1", "--model"]);
    eval.arg(student_dir()).arg("--out").arg(&json);
    assert_eq!(code(eval.stdout(closed()).stderr(Stdio::null())), 0);
    assert!(json.is_file());
}

/// A model whose configuration names an architecture that would set a terminal's title and clear it.
fn model_with_escapes() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    crate::common::copy_dir(teacher_dir(), dir.path());
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["model_type"] = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\rline\u{202e}".into();
    config["architectures"] = serde_json::json!(["\u{1b}[31mEvil"]);
    fs::write(path, config.to_string()).unwrap();
    dir
}

#[track_caller]
fn steers_nothing(text: &str) {
    let steering = |c: char| {
        (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}')
    };
    assert!(!text.contains(steering), "{text:?}");
}

#[test]
fn errors_show_escapes_of_files_and_names() {
    let model = model_with_escapes();
    let outcome = Outcome::of(
        still().args(["generate", "--prompt", "x", "-n", "1", "--model"]).arg(model.path()),
    );
    outcome.failed_with(r"\u{1b}");
    steers_nothing(&outcome.stderr);
    for name in ["/no/\u{1b}[31msuch", "/no/such\nerror: fake"] {
        let outcome = Outcome::of(still().args(["generate", "--prompt", "x", "--model", name]));
        outcome.failed_with("/no/");
        steers_nothing(&outcome.stderr);
    }
    let usage = Outcome::of(still().args(["generate", "--\u{1b}[31m"]));
    usage.failed_with("unexpected argument");
    steers_nothing(&usage.stderr);
}

/// A student that answers with nothing but ESC: its tokenizer's lowest id is that character.
pub fn student_of_escapes() -> tempfile::TempDir {
    let dir = crate::common::chat_dir("unused");
    let path = dir.path().join("student/tokenizer.json");
    let tokenizer = fs::read_to_string(&path).unwrap();
    // Bytes are spelled as letters: ESC is U+011B, and the lowest id is the exclamation mark.
    let mut tokenizer: serde_json::Value = serde_json::from_str(&tokenizer).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab["!"].take();
    let swapped = vocab.insert("\u{11b}".into(), id).unwrap();
    vocab["!"] = swapped;
    fs::write(&path, tokenizer.to_string()).unwrap();
    dir
}

#[test]
fn generated_text_is_data_in_a_pipe_and_harmless_on_a_terminal() {
    let dir = student_of_escapes();
    let mut generate = command();
    generate.args(["generate", "-q", "-n", "3", "--prompt", "The sea", "--model"]);
    generate.arg(dir.path().join("student"));
    let piped = generate.output().unwrap();
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), "\u{1b}\u{1b}\u{1b}\n");

    let (mut ours, theirs) = crate::common::terminal::open(80);
    let status = generate.stdout(theirs.try_clone().unwrap()).stderr(Stdio::null()).status();
    assert!(status.unwrap().success());
    drop(generate);
    drop(theirs);
    let mut shown = Vec::new();
    // A terminal whose other side is gone ends with an error.
    let _ = ours.read_to_end(&mut shown);
    assert_eq!(String::from_utf8(shown).unwrap().trim_end(), r"\u{1b}\u{1b}\u{1b}");
}

/// Named pipes hang whoever opens them, and devices never end: what has to be a file is refused.
#[test]
fn pipes_and_devices_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = |name: &str| {
        let path = dir.path().join(name);
        let made = Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        path
    };
    let text = dir.path().join("data.txt");
    fs::write(&text, words(300)).unwrap();
    let data = pipe("pipe.txt");
    let linearize = |model: &Path, data: &Path, more: &[&str]| {
        let out = dir.path().join("student");
        let mut command = still();
        command.env("STILL_CACHE", dir.path().join("cache"));
        command.args(linearize_args(model, data, &out)).args(more).timeout(DEADLINE);
        Outcome::of(&mut command)
    };
    linearize(teacher_dir(), &data, &[]).failed_with("pipe.txt is a named pipe");
    let recipe = pipe("recipe.toml");
    let by_pipe = linearize_by(&recipe, teacher_dir(), &text, &dir.path().join("student"));
    Outcome::of(still().args(by_pipe).timeout(DEADLINE))
        .failed_with("recipe.toml: it is a named pipe");
    linearize(&pipe("model.gguf"), &text, &[]).failed_with("model.gguf is a named pipe");
    linearize(Path::new("/dev/zero"), &text, &[]).failed_with("/dev/zero is a device");
    let held_out = format!("data.heldout_files=[{:?}]", data.to_str().unwrap());
    linearize(teacher_dir(), &text, &["--set", &held_out]).failed_with("pipe.txt");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let model = tempfile::tempdir().unwrap();
        crate::common::copy_dir(teacher_dir(), model.path());
        fs::remove_file(model.path().join(file)).unwrap();
        let made = Command::new("mkfifo").arg(model.path().join(file)).status().unwrap();
        assert!(made.success());
        linearize(model.path(), &text, &[]).failed_with(file);
    }
    let eval = |more: &[&str]| {
        let mut command = still();
        command.args(["eval", "--model"]).arg(teacher_dir()).args(more).timeout(DEADLINE);
        Outcome::of(&mut command)
    };
    eval(&["--tasks", "perplexity", "--text", data.to_str().unwrap()]).failed_with("pipe.txt");
    pipe("piqa.jsonl");
    eval(&["--tasks", "piqa", "--data-dir", dir.path().to_str().unwrap()]).failed_with("piqa");
    eval(&["--tasks", "repeated_text", "--out", "/dev/null"]).failed_with("it is a device");
}

const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// A prompt is read once: a shell's `<(…)` may give it.
#[test]
fn a_prompt_may_come_through_a_pipe() {
    let run = |prompt: &str| {
        let script = format!("\"$0\" generate -q -n 4 --prompt-file {prompt} --model \"$1\"");
        let mut bash = Command::new("bash");
        bash.args(["-c", &script, BINARY]).arg(student_dir()).stderr(Stdio::piped());
        let output = bash.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let direct = Outcome::of(
        still()
            .args(["generate", "-q", "-n", "4", "--prompt", "The sea", "--model"])
            .arg(student_dir()),
    );
    assert_eq!(run("<(printf 'The sea')"), direct.stdout.as_bytes());
    assert_eq!(run("/dev/stdin < <(printf 'The sea')"), direct.stdout.as_bytes());
}

/// What never ends is cut off, within the memory that a small machine has.
#[test]
fn a_prompt_without_end_is_refused() {
    let limited = |arguments: &[&str]| {
        let script = "ulimit -v 6000000; exec \"$0\" \"$@\" < /dev/zero";
        let mut shell = assert_cmd::Command::new("sh");
        shell.args(["-c", script, BINARY]).args(arguments).timeout(DEADLINE);
        shell.env("RAYON_NUM_THREADS", "1");
        Outcome::of(&mut shell)
    };
    let student = student_dir().to_str().unwrap();
    limited(&["generate", "--model", student]).failed_with("more than 256 MiB");
    limited(&["generate", "--model", student, "--prompt-file", "/dev/zero"])
        .failed_with("a device");
    let chat = crate::common::chat_dir("{{ messages[-1].content }}");
    let chat = chat.path().join("student");
    limited(&["chat", "--model", chat.to_str().unwrap()]).failed_with("more than 16 MiB");
}
