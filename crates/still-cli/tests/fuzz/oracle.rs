//! Runs one case and judges how it ended.

use std::fs;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::BINARY;
use crate::corpus::Target;

/// Of address space.
const MEMORY: u64 = 4 << 30;
/// Of processor time: the tests' machine may be busy with others.
const SECONDS: u64 = 10;
/// Longest wait for a case that computes nothing.
const STUCK: Duration = Duration::from_secs(120);

/// Copies the target's files to `scratch`, one of them changed, and runs its command there: the exit code, 0 or 1, or
/// what was wrong with the end.
pub fn run(
    corpus: &Path,
    target: &Target,
    scratch: &Path,
    changed: Option<(&str, &[u8])>,
) -> Result<i32, String> {
    if scratch.exists() {
        fs::remove_dir_all(scratch).unwrap();
    }
    copy_tree(&corpus.join(target.from), scratch);
    if let Some((file, bytes)) = changed {
        fs::write(scratch.join(file), bytes).unwrap();
    }
    let mut command = Command::new(BINARY);
    command
        .current_dir(scratch)
        .args(target.command)
        .env_clear()
        .env("HF_HUB_OFFLINE", "1")
        .env("RAYON_NUM_THREADS", "1")
        .env("STILL_CACHE", scratch.join("cache"))
        .env("HOME", scratch)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(fs::File::create(scratch.join("stderr")).unwrap());
    // SAFETY: nothing but system calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            limit(libc::RLIMIT_AS, MEMORY)?;
            limit(libc::RLIMIT_CPU, SECONDS)?;
            limit(libc::RLIMIT_CORE, 0)
        });
    }
    let mut child = command.spawn().unwrap();
    // It may end before it has read anything.
    let _ = child.stdin.take().unwrap().write_all(target.stdin.as_bytes());
    let started = Instant::now();
    let mut pause = Duration::from_micros(500);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > STUCK {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("stuck for {} s", STUCK.as_secs()));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    let stderr = fs::read(scratch.join("stderr")).unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(0),
        (Some(1), _) => told(&stderr).map(|()| 1),
        (Some(code), _) => Err(format!("exit {code}: {}", end(&stderr))),
        (None, Some(libc::SIGXCPU)) => Err(format!("computes for more than {SECONDS} s")),
        (None, signal) => Err(format!("signal {}: {}", signal.unwrap_or(0), end(&stderr))),
    }
}

/// What cannot be used is told in one line, and the next says what to do.
fn told(stderr: &str) -> Result<(), String> {
    let lines = |start: &str| stderr.lines().filter(|line| line.starts_with(start)).count();
    if lines("error: ") != 1 || lines("hint: ") != 1 {
        return Err(format!("exit 1 without one error and one hint: {}", end(stderr)));
    }
    if stderr.contains("panicked") || stderr.contains("this is a bug") {
        return Err(format!("exit 1 for a bug: {}", end(stderr)));
    }
    match stderr.chars().find(|&c| c.is_control() && c != '\n' && c != '\t') {
        Some(c) => Err(format!("a control character {c:?} on stderr: {}", end(stderr))),
        None => Ok(()),
    }
}

fn end(stderr: &str) -> String {
    let text = stderr.trim().replace('\n', " | ");
    let skipped = text.chars().count().saturating_sub(600);
    text.chars().skip(skipped).collect()
}

fn limit(resource: libc::__rlimit_resource_t, most: u64) -> std::io::Result<()> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most + 5 };
    // SAFETY: a valid pointer to a limit.
    match unsafe { libc::setrlimit(resource, &limit) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Copies a directory with all below it.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &target),
            false => {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }
}
