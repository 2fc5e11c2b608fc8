//! The command line's surface: help, version, usage errors, doctor.

mod common;

use common::{Outcome, still};

#[test]
fn help_names_every_command_on_stdout() {
    let outcome = Outcome::of(still().arg("--help"));
    outcome.succeeded();
    for command in
        ["demo", "linearize", "report", "generate", "chat", "inspect", "bench", "eval", "doctor"]
    {
        assert!(outcome.stdout.contains(&format!("\n  {command} ")), "{}", outcome.stdout);
    }
    assert!(outcome.stderr.is_empty(), "{}", outcome.stderr);
}

#[test]
fn every_command_has_help() {
    for command in
        ["demo", "linearize", "report", "generate", "chat", "inspect", "bench", "eval", "doctor"]
    {
        let outcome = Outcome::of(still().args([command, "--help"]));
        outcome.succeeded();
        assert!(outcome.stdout.contains("Usage: still"), "{}", outcome.stdout);
    }
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
    let mut child = std::process::Command::new(common::BINARY)
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
