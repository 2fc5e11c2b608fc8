//! The command line's surface: help, version, usage errors, doctor.

use crate::common::{Outcome, still, teacher_dir};

const COMMANDS: [&str; 17] = [
    "demo",
    "linearize",
    "calibrate",
    "export",
    "ask",
    "generate",
    "chat",
    "serve",
    "eval",
    "bench",
    "inspect",
    "report",
    "recipes",
    "models",
    "doctor",
    "completions",
    "man",
];

#[test]
fn help_names_every_command_on_stdout_by_what_it_is_for() {
    let outcome = Outcome::of(still().arg("--help"));
    outcome.succeeded();
    let place = |text: &str| outcome.stdout.find(text).unwrap_or_else(|| panic!("no {text:?}"));
    let commands = COMMANDS.map(|command| place(&format!("\n  {command} ")));
    assert!(commands.is_sorted(), "{}", outcome.stdout);
    let groups = ["Train", "Run", "Evaluate", "Look", "Set up", "Options", "Examples"];
    assert!(groups.map(|group| place(&format!("\n{group}:\n"))).is_sorted());
    assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
    // Off a terminal without colors.
    assert!(!outcome.stdout.contains('\u{1b}'), "{:?}", outcome.stdout);
}

#[test]
fn every_command_has_help_with_examples() {
    let commands = COMMANDS.map(|command| vec![command]);
    let of_commands = [
        ["bench", "model"],
        ["bench", "train"],
        ["bench", "attention"],
        ["report", "run"],
        ["report", "eval"],
    ];
    for command in commands.into_iter().chain(of_commands.map(Vec::from)) {
        let outcome = Outcome::of(still().args(&command).arg("--help"));
        outcome.succeeded();
        let name = command.join(" ");
        assert!(outcome.stdout.contains(&format!("Usage: still {name} ")), "{}", outcome.stdout);
        let examples = format!("\nExamples:\n  still {name}");
        assert!(outcome.stdout.contains(&examples), "{}", outcome.stdout);
    }
}

/// Whoever types what was right before is told what to type now, word for word.
#[test]
fn spellings_that_moved_say_what_to_type() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("results.json"), "{}").unwrap();
    for (old, new) in [
        ("bench --model m --contexts 64", "bench model --model m --contexts 64"),
        ("bench --op attention --heads 4", "bench attention --heads 4"),
        ("bench --op=attention -q", "bench attention -q"),
        ("-v bench --stages finetune -m m", "-v bench train --stages finetune -m m"),
        ("report my.run --json", "report run my.run --json"),
        ("report results.json", "report eval results.json"),
    ] {
        let outcome = Outcome::of(still().current_dir(dir.path()).args(old.split(' ')));
        outcome.failed_with("is followed by one of");
        let hint = format!("hint: type `still {new}`\n");
        assert!(outcome.stderr.ends_with(&hint), "{old}: {}", outcome.stderr);
    }
}

#[test]
fn a_shell_completes_commands_options_and_values() {
    let script = |shell: &str| {
        let outcome = Outcome::of(still().args(["completions", shell]));
        outcome.succeeded();
        assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
        outcome.stdout
    };
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        for word in ["linearize", "attention", "cache-dtype", "int8", "int4"] {
            assert!(script(shell).contains(word), "no {word} for {shell}");
        }
    }
    Outcome::of(still().args(["completions", "cmd"])).failed_with("invalid value 'cmd'");

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("still.bash"), script("bash")).unwrap();
    let completed = |line: &str| {
        let ask = "set -eu; source still.bash; COMP_WORDS=($1 \"\"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); \
                   _still still \"\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; echo \"${COMPREPLY[@]}\"";
        let output = std::process::Command::new("bash")
            .current_dir(dir.path())
            .args(["-c", ask, "bash", line])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let commands = completed("still");
    assert!(COMMANDS.iter().all(|command| commands.contains(command)), "{commands}");
    assert!(completed("still bench").contains("model train attention"));
    let options = completed("still bench attention");
    assert!(options.contains("--head-dim") && !options.contains("--new-tokens"), "{options}");
    assert_eq!(completed("still generate --cache-dtype").trim(), "f32 bf16 f16 int8 int4");
}

#[test]
fn every_command_has_a_manual_page() {
    let dir = tempfile::tempdir().unwrap();
    let man = dir.path().join("share/man1");
    let write = || Outcome::of(still().args(["man", "--out"]).arg(&man));
    write().succeeded();
    let pages = || {
        let names = man.read_dir().unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let mut expected: Vec<String> =
        COMMANDS.iter().map(|command| format!("still-{command}.1")).collect();
    for name in [
        "",
        "-bench-model",
        "-bench-train",
        "-bench-attention",
        "-recipes-list",
        "-recipes-show",
        "-report-run",
        "-report-eval",
    ] {
        expected.push(format!("still{name}.1"));
    }
    expected.sort();
    assert_eq!(pages(), expected);
    let page = std::fs::read_to_string(man.join("still-bench-attention.1")).unwrap();
    for part in [
        ".TH still-bench-attention 1",
        "still bench attention",
        "\\-\\-head\\-dim",
        "\\-\\-threads",
        ".SH EXAMPLES\n.EX\nstill bench attention \\-\\-contexts 2048,8192\n",
    ] {
        assert!(page.contains(part), "no {part:?} in {page}");
    }
    // Pages are written again; a file of another kind is not touched.
    write().succeeded();
    std::fs::write(man.join("still-chat.1"), "mine").unwrap();
    write().failed_with("still-chat.1 exists and is not a manual page that still wrote");
    assert_eq!(std::fs::read_to_string(man.join("still-chat.1")).unwrap(), "mine");
    assert_eq!(pages(), expected);
}

#[test]
fn version_is_a_result() {
    let outcome = Outcome::of(still().arg("--version"));
    outcome.succeeded();
    assert_eq!(outcome.stdout, format!("still {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn usage_errors_exit_with_1() {
    for arguments in [
        vec!["no-such-command"],
        vec!["generate"],
        vec!["generate", "--model", "x", "--no-such-option"],
        vec!["generate", "--model", "x", "--prompt", "a", "--prompt-file", "b"],
        vec!["linearize", "--model", "x", "--out", "y"],
        vec!["doctor", "--quiet", "--verbose"],
        vec!["bench"],
        vec!["bench", "modle"],
        vec!["report"],
        vec![],
    ] {
        let outcome = Outcome::of(still().args(&arguments));
        assert_eq!(outcome.code, 1, "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stdout.is_empty(), "{arguments:?}: {}", outcome.stdout);
    }
}

#[test]
fn doctor_reports_as_text_and_json() {
    let text = Outcome::of(still().arg("doctor"));
    text.succeeded();
    assert!(text.stdout.starts_with(&format!("still {}", env!("CARGO_PKG_VERSION"))));

    let json = Outcome::of(still().args(["doctor", "--json"]));
    json.succeeded();
    let report = json.json();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["cpu"]["threads_used"].as_u64().unwrap() >= 1);
    assert_eq!(report["devices"][0]["name"], "cpu");
    let cuda = &report["devices"][1];
    assert_eq!(cuda["name"], "cuda");
    #[cfg(not(feature = "cuda"))]
    assert!(cuda["available"] == false && cuda["note"].as_str().unwrap().contains("without CUDA"));
    assert!(report["caches"][0]["path"].is_string());
}

#[test]
fn doctor_follows_the_cache_setting() {
    let json =
        Outcome::of(still().env("STILL_CACHE", "/somewhere/else").args(["doctor", "--json"]));
    assert_eq!(json.json()["caches"][0]["path"], "/somewhere/else");
}

#[test]
fn what_was_fetched_is_listed_with_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let (own, hub) = (dir.path().join("still"), dir.path().join("home/hub"));
    let models = |more: &[&str]| {
        let mut command = still();
        command.env("STILL_CACHE", &own).env("HF_HOME", dir.path().join("home"));
        let outcome = Outcome::of(command.arg("models").args(more));
        outcome.succeeded();
        outcome
    };
    assert!(models(&[]).stderr.contains("nothing was fetched yet"));
    for (file, bytes) in [
        (own.join("base.gguf"), 3000),
        (own.join("tokens/0a.bin"), 500),
        (hub.join("models--org--a--b/blobs/1"), 2000),
        (hub.join("datasets--org--books/blobs/2"), 1000),
    ] {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, vec![0; bytes]).unwrap();
    }
    let json = models(&["--json"]).json();
    let told: Vec<(String, u64)> = json["cached"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["name"].as_str().unwrap().to_owned(), one["bytes"].as_u64().unwrap()))
        .collect();
    let expected = [
        (own.join("base.gguf").display().to_string(), 3000),
        ("org/a--b".to_owned(), 2000),
        ("org/books".to_owned(), 1000),
        (own.join("tokens").display().to_string(), 500),
    ];
    assert_eq!(told, expected);
    let text = models(&[]);
    assert!(text.stdout.contains("org/a--b") && text.stdout.contains("6.3 KiB"), "{}", text.stdout);
}

#[test]
fn threads_are_those_asked_for_on_every_command() {
    let used = |variable: Option<&str>, arguments: &[&str]| {
        let mut command = still();
        command.env_remove("RAYON_NUM_THREADS");
        variable.map(|value| command.env("RAYON_NUM_THREADS", value));
        Outcome::of(command.args(["doctor", "--json"]).args(arguments))
    };
    let count = |outcome: Outcome| outcome.json()["cpu"]["threads_used"].as_u64().unwrap();
    let granted = std::thread::available_parallelism().unwrap().get() as u64;
    assert_eq!(count(used(None, &["--threads", "3"])), 3);
    assert_eq!(count(used(Some("2"), &["--threads", "3"])), 3);
    assert_eq!(count(used(Some("2"), &[])), 2);
    assert_eq!(count(used(Some("0"), &[])), granted);
    assert_eq!(count(used(None, &[])), granted);
    used(None, &["--threads", "0"]).failed_with("--threads 0 is out of range");
    used(None, &["--threads", "1025"]).failed_with("--threads 1025 is out of range");
    used(Some("many"), &[]).failed_with("RAYON_NUM_THREADS many is out of range");
    used(Some("99999999999999999999"), &[]).failed_with("is out of range");
}

#[test]
fn a_closed_pipe_is_no_failure() {
    use std::process::Stdio;
    let mut child = std::process::Command::new(crate::common::BINARY)
        .args(["doctor", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// `RUST_BACKTRACE`, which a developer may have set, is for panics.
#[test]
fn no_error_has_a_backtrace() {
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("damaged");
    std::fs::create_dir(&damaged).unwrap();
    for entry in teacher_dir().read_dir().unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), damaged.join(entry.file_name())).unwrap();
    }
    std::fs::write(damaged.join("model.safetensors"), b"no tensors").unwrap();
    let damaged = damaged.to_str().unwrap();
    for (arguments, words) in [
        (vec!["generate", "--prompt", "x", "--model", damaged], "model.safetensors"),
        (vec!["generate", "--prompt", "x", "--model", "/no/such"], "no model at"),
        (vec!["generate", "--prompt", "x", "--model", "x", "--device", "tpu"], "tpu"),
        (vec!["recipes", "show", "no-such"], "no-such"),
        (vec!["eval", "--tasks", "no-such", "--model", damaged], "no-such"),
        (vec!["doctor", "--no-such-option"], "--no-such-option"),
    ] {
        for value in ["1", "full"] {
            let outcome = Outcome::of(still().env("RUST_BACKTRACE", value).args(&arguments));
            outcome.failed_with(words);
            let lines = outcome.stderr.lines();
            let of_errors = lines.filter(|line| !line.starts_with(' ')).count();
            assert_eq!(of_errors, 2, "{}", outcome.stderr);
            assert!(!outcome.stderr.contains("0: "), "{}", outcome.stderr);
        }
    }
}
