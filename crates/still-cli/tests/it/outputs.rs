//! Where commands write: known to be possible before any work, one run at a time, and never over what is not ours.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{BINARY, Outcome, linearize_args, still, student_dir, teacher_dir, words};

const SHORT: [&str; 8] = [
    "--set",
    "data.length=64",
    "--set",
    "transfer.steps=2",
    "--set",
    "finetune.steps=1",
    "--set=checkpoint.every=1",
    "--no-tensorboard",
];

/// `still linearize` of two steps, in a directory.
fn linearize(dir: &Path, out: &str, more: &[&str]) -> Outcome {
    let data = dir.join("data.txt");
    fs::write(&data, words(600)).unwrap();
    let mut command = still();
    command.current_dir(dir).env("STILL_CACHE", dir.join("cache"));
    command.args(linearize_args(teacher_dir(), &data, Path::new(out))).args(SHORT).args(more);
    Outcome::of(&mut command)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = dir
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn paths_may_end_in_slashes_and_dots() {
    for out in ["student/", "student//", "./student", "student/.", "x/../student", "./y/./student/"]
    {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        linearize(dir.path(), out, &[]).succeeded();
        let parent = if out.contains('y') { dir.path().join("y") } else { dir.path().into() };
        assert!(parent.join("student/config.json").is_file(), "{out}");
        assert!(parent.join("student.run/metrics.jsonl").is_file(), "{out}");
        let hidden: Vec<String> =
            names(&parent).into_iter().filter(|name| name.starts_with('.')).collect();
        assert!(hidden.is_empty(), "{out}: {hidden:?}");
        linearize(dir.path(), out, &["--resume"]).failed_with("exists already");
        linearize(dir.path(), out, &["--resume", "--overwrite"]).succeeded();
    }
}

/// Nothing is trained for an output that will be refused.
#[test]
fn outputs_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let refused = |out: &str, more: &[&str], words: &str| {
        let outcome = linearize(dir, out, more);
        outcome.failed_with(words);
        assert!(!outcome.stderr.contains("Loading"), "{}", outcome.stderr);
    };
    fs::create_dir(dir.join("foreign")).unwrap();
    fs::write(dir.join("foreign/notes.txt"), "mine").unwrap();
    refused("foreign", &["--overwrite"], "is not a student");
    refused("foreign", &[], "exists already");
    refused("new", &["--run-dir", "foreign"], "holds notes.txt");
    fs::write(dir.join("file"), "mine").unwrap();
    refused("file", &["--overwrite"], "no directory");
    refused("file/student", &[], "");
    refused("new", &["--run-dir", "file"], "is no directory");
    refused("new", &["--run-dir", "new"], "in the student's directory");
    refused("new", &["--run-dir", "./new/run"], "in the student's directory");
    refused(".", &["--overwrite"], "is not a student");
    refused("..", &["--overwrite"], "");
    refused("no/such/..", &[], "names no directory");
    symlink("nowhere", dir.join("dangling")).unwrap();
    refused("dangling", &[], "exists already");
    refused("dangling", &["--overwrite"], "leads nowhere");
    refused("new", &["--resume"], "no checkpoint to resume from");
    assert_eq!(fs::read_to_string(dir.join("foreign/notes.txt")).unwrap(), "mine");
    assert!(!dir.join("new").exists() && !dir.join("new.run").exists(), "{:?}", names(dir));
}

/// A student is replaced whole or not at all: with a file of somebody else in its directory, not at all.
#[test]
fn overwrite_removes_only_what_still_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    linearize(dir, "student", &[]).succeeded();
    let notes = dir.join("student/README.md");
    fs::write(&notes, "mine").unwrap();
    let refused = linearize(dir, "student", &["--overwrite", "--resume"]);
    refused.failed_with("holds README.md");
    assert!(!refused.stderr.contains("Loading"), "{}", refused.stderr);
    assert_eq!(fs::read_to_string(&notes).unwrap(), "mine");
    fs::remove_file(&notes).unwrap();
    linearize(dir, "student", &["--overwrite", "--resume"]).succeeded();

    // A link stays a link, and what it leads to is replaced.
    fs::create_dir(dir.join("real")).unwrap();
    symlink("real", dir.join("link")).unwrap();
    linearize(dir, "link", &["--overwrite"]).succeeded();
    assert!(dir.join("link").is_symlink() && dir.join("real/config.json").is_file());
    assert!(dir.join("link.run/metrics.jsonl").is_file());
}

#[test]
fn every_command_checks_its_files_first() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text = dir.join("text.txt");
    fs::write(&text, words(600)).unwrap();
    let foreign = dir.join("foreign");
    fs::write(&foreign, "mine").unwrap();
    let foreign = foreign.to_str().unwrap();
    let (model, text) = (student_dir().to_str().unwrap(), text.to_str().unwrap());
    let teacher = teacher_dir().to_str().unwrap();
    let eval = ["eval", "-m", model, "--tasks", "repeated_text", "--lengths", "64", "--limit", "1"];
    let calibrate = ["calibrate", "-m", teacher, "--data", text, "--overwrite"];
    let gguf = dir.join("foreign.gguf");
    fs::write(&gguf, "mine").unwrap();
    let gguf = gguf.to_str().unwrap();
    let export = ["export", "-m", model, "--gguf", "q8_0", "--overwrite", "--out"];
    let inspect = ["inspect", "-m", model, "--text", text, "--html"];
    let refused = |arguments: &[&[&str]], words: &str| {
        let outcome = Outcome::of(still().current_dir(dir).args(arguments.concat()));
        outcome.failed_with(words);
        assert!(!outcome.stderr.contains("Load"), "{}", outcome.stderr);
    };
    refused(&[&eval, &["--out", foreign]], "exists and is not a result of `still eval`");
    refused(&[&eval, &["--out", "no/such.json"]], "nothing can be written in no");
    refused(&[&eval, &["--samples", "no/such.jsonl"]], "nothing can be written in no");
    refused(&[&eval, &["--out", "a", "--samples", "./a"]], "name one file");
    refused(&[&eval, &["--out", "a/"]], "the name of a directory");
    refused(&[&calibrate, &["--out", foreign]], "exists and is not budgets");
    refused(&[&calibrate, &["--html", foreign]], "exists and is not a page");
    refused(&[&calibrate, &["--out", "a", "--html", "a"]], "name one file");
    refused(&[&calibrate, &["--out", "no/such"]], "nothing can be written in no");
    refused(&[&export, &[gguf]], "exists and is not a student");
    refused(&[&export, &["no/such.gguf"]], "nothing can be written in no");
    refused(&[&export, &["student.bin"]], "the name of a GGUF file");
    refused(&[&inspect, &[foreign]], "exists and is not a page");
    refused(&[&inspect, &[text]], "would replace");
    linearize(dir, "student", &[]).succeeded();
    refused(&[&["report", "run", "student.run", "--out", foreign]], "exists and is not a page");
    for (file, text) in [(foreign, "mine"), (gguf, "mine")] {
        assert_eq!(fs::read_to_string(file).unwrap(), text);
    }
    // What they wrote themselves they replace.
    for _ in 0..2 {
        for command in [
            [&eval[..], &["--out", "results.json"]].concat(),
            [&inspect[..], &["page.html"]].concat(),
            vec!["report", "run", "student.run"],
            vec!["report", "eval", "results.json", "--markdown", "results.md"],
        ] {
            Outcome::of(still().current_dir(dir).args(&command)).succeeded();
        }
    }
    let page = dir.join("page.html");
    let before = fs::metadata(&page).unwrap().permissions().mode() & 0o777;
    assert_eq!(before, 0o666 & !umask(), "as any file that is made here");
}

fn umask() -> u32 {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    0o666 & !fs::metadata(&file).unwrap().permissions().mode()
}

/// Nothing that still leaves is private, unless the umask says so.
#[test]
fn files_have_the_modes_of_the_umask() {
    let dir = tempfile::tempdir().unwrap();
    linearize(dir.path(), "student", &[]).succeeded();
    fn visit(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in dir.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                visit(&entry, files);
            }
            files.push(entry);
        }
    }
    let mut files = Vec::new();
    visit(dir.path(), &mut files);
    assert!(files.len() > 12, "{files:?}");
    for path in files {
        let mode = path.metadata().unwrap().permissions().mode() & 0o777;
        let usual = if path.is_dir() { 0o777 } else { 0o666 };
        assert_eq!(mode, usual & !umask(), "{}: {mode:o}", path.display());
    }
}

/// A second start harms nothing, and one that was killed leaves no lock.
#[test]
fn a_run_is_alone_in_its_directories() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let data = dir.join("data.txt");
    fs::write(&data, words(600)).unwrap();
    let command = |out: &str, more: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(linearize_args(teacher_dir(), &data, &dir.join(out))).args(SHORT).args(more);
        command.env("STILL_CACHE", dir.join("cache")).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let endless = ["--set", "transfer.steps=200000"];
    let mut first = command("student", &endless).spawn().unwrap();
    let checkpoints = dir.join("student.run/checkpoints");
    let patience = Instant::now();
    while !checkpoints.is_dir() {
        assert!(patience.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    for _ in 0..10 {
        for more in [&[][..], &["--resume"][..]] {
            let second = command("student", more).output().unwrap();
            let stderr = String::from_utf8_lossy(&second.stderr).into_owned();
            assert_eq!(second.status.code(), Some(1), "{stderr}");
            let by = format!("another still works in it (process {}, for ", first.id());
            assert!(stderr.contains(&by), "{stderr}");
        }
    }
    // Another run directory, but the same student.
    let third = command("student", &["--run-dir", dir.join("other").to_str().unwrap()]);
    let third = { third }.output().unwrap();
    let stderr = String::from_utf8_lossy(&third.stderr).into_owned();
    assert!(stderr.contains("is being written by another still"), "{stderr}");
    // Another student beside it, of the same data.
    assert!(command("beside", &[]).status().unwrap().success());
    assert!(first.try_wait().unwrap().is_none(), "the first run died of the others");

    first.kill().unwrap();
    first.wait().unwrap();
    // What a kill may leave in every place.
    fs::create_dir_all(checkpoints.join(".saving-left")).unwrap();
    for left in [".still-saving-left", "cache/tokens/.tokenizing-left"] {
        fs::create_dir_all(dir.join(left)).unwrap();
        fs::write(dir.join(left).join("half"), "x").unwrap();
    }
    for left in [".still-writing-left", "student.run/.still-writing-left"] {
        fs::write(dir.join(left), "x").unwrap();
    }
    fs::write(&data, words(700)).unwrap();
    fs::remove_dir_all(&checkpoints).unwrap();
    fs::create_dir_all(checkpoints.join(".saving-left")).unwrap();
    assert!(command("student", &[]).status().unwrap().success());
    let left = |dir: PathBuf| -> Vec<String> {
        names(&dir).into_iter().filter(|name| name.starts_with('.')).collect()
    };
    for place in ["", "student.run", "student.run/checkpoints", "cache/tokens"] {
        assert_eq!(left(dir.join(place)), [""; 0], "in {place:?}");
    }
}

/// The old student is put back if a kill came between the two renames of its replacement.
#[test]
fn a_replacement_that_was_cut_off_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    linearize(dir, "student", &[]).succeeded();
    fs::rename(dir.join("student"), dir.join(".student.previous")).unwrap();
    linearize(dir, "student", &["--overwrite", "--resume"]).succeeded();
    assert!(dir.join("student/config.json").is_file());
    assert!(!dir.join(".student.previous").exists());
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let bench = |more: &[&str]| {
        let script = "ulimit -v 6000000; exec \"$0\" \"$@\"";
        let mut shell = assert_cmd::Command::new("sh");
        shell.args(["-c", script, BINARY, "bench", "model", "--new-tokens", "4", "--model"]);
        shell.env("RAYON_NUM_THREADS", "1").arg(student_dir()).args(more);
        Outcome::of(&mut shell)
    };
    bench(&["--contexts", "64", "--batch", "1000000000000"]).failed_with("--batch 1000000000000");
    bench(&["--contexts", "1000000", "--batch", "60000"]).failed_with("need about");
    bench(&["--contexts", "1073741824", "--variants", "dense"]).failed_with("need about");
}
