//! `kill -9` at any moment loses no checkpoint: twenty times, and the student is still the one of a quiet run.

#![cfg(unix)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{linearize_args, teacher_dir, words};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const KILLS: usize = 20;

fn start(dir: &Path, out: &str, resume: bool) -> Child {
    let mut command = Command::new(common::BINARY);
    command.args(linearize_args(teacher_dir(), &dir.join("data.txt"), &dir.join(out)));
    for set in [
        "data.length=64",
        "transfer.steps=30",
        "finetune.steps=30",
        "finetune.dropout=0.1",
        "checkpoint.every=1",
        "evaluation.every=10",
        "evaluation.windows=0",
        "evaluation.repeated_text=16",
    ] {
        command.args(["--set", set]);
    }
    if resume {
        command.arg("--resume");
    }
    command.arg("--overwrite").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn succeeded(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Everything that a run leaves but the time that evaluations took.
fn left(dir: &Path, out: &str) -> (Vec<u8>, String, Vec<serde_json::Value>) {
    let run = dir.join(format!("{out}.run"));
    let evaluations = fs::read_to_string(run.join("evaluations.jsonl")).unwrap();
    let evaluations = evaluations.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["seconds"] = 0.into();
        line
    });
    (
        fs::read(dir.join(out).join("model.safetensors")).unwrap(),
        fs::read_to_string(run.join("metrics.jsonl")).unwrap(),
        evaluations.collect(),
    )
}

/// The step of the newest complete checkpoint, over both stages.
fn newest(dir: &Path) -> Option<String> {
    let entries = dir.join("killed.run/checkpoints").read_dir().ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // "transfer" comes before "finetune" in a run, after it in the alphabet.
    let order = |name: &String| (name.starts_with("finetune"), name.clone());
    names.filter(|name| name.contains("-step-")).max_by_key(order)
}

#[test]
fn a_run_killed_twenty_times_ends_as_a_quiet_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("data.txt"), words(1000)).unwrap();
    let started = Instant::now();
    succeeded(start(dir, "quiet", false));
    // Each process is killed somewhere in what would be the first quarter of a whole run.
    let longest_us = started.elapsed().as_micros() as u64 / 4;
    let quiet = left(dir, "quiet");

    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let (mut kills, mut saved) = (0, None);
    while kills < KILLS {
        let mut child = start(dir, "killed", saved.is_some());
        let moment = Instant::now() + Duration::from_micros(rng.random_range(0..longest_us));
        while Instant::now() < moment && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_some() {
            // It was done before its moment came: compare, and begin anew.
            succeeded(child);
            assert!(left(dir, "killed") == quiet, "after {kills} kills");
            fs::remove_dir_all(dir.join("killed.run")).unwrap();
            saved = None;
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        let now = newest(dir);
        let order = |name: &Option<String>| {
            name.as_ref().map(|name| (name.starts_with("finetune"), name.clone()))
        };
        assert!(order(&now) >= order(&saved), "{saved:?} was lost: {now:?}");
        saved = now;
    }
    succeeded(start(dir, "killed", saved.is_some()));
    assert!(left(dir, "killed") == quiet, "the run that was killed ends as another student");
    let checkpoints = dir.join("killed.run/checkpoints").read_dir().unwrap();
    let names: Vec<_> = checkpoints.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "what kills left half-written is gone: {names:?}");
}
