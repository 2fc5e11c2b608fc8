//! Where a result comes from: the command, the day, the machine and the version that made it.

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use still_model::files::write_file;

use crate::run_log::lines;

/// Its file in a run directory: a line for each start of the run.
const FILE: &str = "starts.jsonl";

/// What made a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// As it was named.
    pub model: String,
    /// As a shell takes it.
    pub command: String,
    /// UTC: `2026-11-29 20:21`.
    pub date: String,
    /// CPU, threads, system, and the device if that is another.
    pub machine: String,
    /// Of `still`.
    pub version: String,
}

impl Provenance {
    /// Of this process, which computes with `model` on `device`.
    pub fn now(model: &str, device: &str) -> Self {
        let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
        let words = by_name(words.collect());
        let quoted = shlex::try_join(words.iter().map(String::as_str));
        Self {
            model: model.into(),
            command: quoted.unwrap_or_else(|_| words.join(" ")),
            date: chrono::Utc::now().format("%Y-%m-%d %H:%M").to_string(),
            machine: machine(device),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Writes this start into a run's directory, after those before it if the run is resumed.
    ///
    /// # Errors
    /// A disk that cannot be written.
    pub fn record(&self, run_dir: &Path, resume: bool) -> anyhow::Result<()> {
        let path = run_dir.join(FILE);
        let mut starts = if resume { Self::starts(run_dir)? } else { Vec::new() };
        starts.push(self.clone());
        let lines = starts.iter().map(|start| Ok(serde_json::to_string(start)? + "\n"));
        let lines: String = lines.collect::<serde_json::Result<_>>()?;
        write_file(&path, lines.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Every start of the run in a directory; none of runs that older versions made.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn starts(run_dir: &Path) -> anyhow::Result<Vec<Self>> {
        Ok(lines::read(&run_dir.join(FILE))?.unwrap_or_default())
    }

    /// Date and version, for people.
    pub fn when(&self) -> String {
        format!("{} UTC, still {}", self.date, self.version)
    }
}

/// A command with the program by its name: where it is installed, or that Python runs it, says nothing about the result.
fn by_name(words: Vec<String>) -> Vec<String> {
    let is_still = |word: &String| Path::new(word).file_stem().is_some_and(|stem| stem == "still");
    let program = words.iter().take(3).position(is_still).unwrap_or(0);
    std::iter::once("still".into()).chain(words.into_iter().skip(program + 1)).collect()
}

/// `AMD EPYC 9354, 2 threads, linux x86_64, cuda:0`
fn machine(device: &str) -> String {
    let threads = match rayon::current_num_threads() {
        1 => "1 thread".into(),
        threads => format!("{threads} threads"),
    };
    let system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    let device = (device != "cpu").then(|| device.to_owned());
    let parts = cpu_name().into_iter().chain([threads, system]).chain(device);
    parts.collect::<Vec<_>>().join(", ")
}

/// What the processor calls itself, where the system tells.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_of_a_run_is_known() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Provenance::starts(dir.path()).unwrap().is_empty());
        let first = Provenance::now("base", "cpu");
        let second = Provenance { command: "still linearize --resume".into(), ..first.clone() };
        first.record(dir.path(), false).unwrap();
        second.record(dir.path(), true).unwrap();
        assert_eq!(Provenance::starts(dir.path()).unwrap(), [first, second.clone()]);
        second.record(dir.path(), false).unwrap();
        assert_eq!(Provenance::starts(dir.path()).unwrap(), [second]);
    }

    #[test]
    fn a_command_has_the_programs_name_whoever_runs_it() {
        let named =
            |words: &[&str]| by_name(words.iter().map(|&w| w.to_owned()).collect()).join(" ");
        assert_eq!(
            named(&["/usr/bin/still", "chat", "--model", "still"]),
            "still chat --model still"
        );
        assert_eq!(named(&["python3", "/venv/bin/still", "eval"]), "still eval");
        assert_eq!(named(&["python3", "-m", "still", "eval"]), "still eval");
        assert_eq!(named(&["a-test"]), "still");
    }

    #[test]
    fn the_machine_is_named_with_its_device() {
        let now = Provenance::now("base", "cuda:1");
        assert!(now.machine.contains("thread") && now.machine.ends_with("cuda:1"), "{now:?}");
        assert!(now.machine.contains(std::env::consts::ARCH), "{now:?}");
        assert!(!Provenance::now("base", "cpu").machine.contains("cpu,"), "{now:?}");
        assert!(now.command.starts_with("still"), "{now:?}");
        let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit() || "- :".contains(c));
        assert!(now.date.len() == 16 && digits(&now.date), "{now:?}");
    }
}
