//! Ctrl-C, SIGTERM and SIGHUP: within a second, with a line that says so, and nothing lost.

#![cfg(unix)]

mod common;
#[path = "signals/phases.rs"]
mod phases;

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::terminal::{CTRL_C, CTRL_D, ENTER, Terminal};
use common::{BINARY, chat_dir, linearize_args, student_dir, teacher_dir, words};

/// Waits until something is so.
#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let patience = Instant::now();
    while !so() {
        assert!(patience.elapsed() < Duration::from_secs(120), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn still(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments).env("HF_HUB_OFFLINE", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Whoever runs the tests may have it ignored.
    // SAFETY: signal may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            Ok(())
        });
    }
    command
}

/// Of a child whose stderr goes to a file: that it said so.
fn said(log: &Path, words: &str) -> bool {
    fs::read_to_string(log).is_ok_and(|text| text.contains(words))
}

/// Reading a long prompt is given up at once.
#[test]
fn ctrl_c_while_a_prompt_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (prompt, log) = (dir.path().join("prompt.txt"), dir.path().join("log"));
    fs::write(&prompt, words(400_000)).unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let mut command = still(&["generate", "-n", "2", "--model"]);
        command.arg(student_dir()).arg("--prompt-file").arg(&prompt);
        let child = command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
        until("the model is loaded", || said(&log, "Loaded"));
        std::thread::sleep(Duration::from_millis(300));
        let sent = Instant::now();
        send(&child, signal);
        let output = child.wait_with_output().unwrap();
        let took = sent.elapsed();
        let stderr = fs::read_to_string(&log).unwrap();
        // Ended by itself it says Ctrl-C's code, ended by the signal its own.
        assert!([130, code].contains(&output.status.code().unwrap()), "{output:?}: {stderr}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(stderr.contains("error: interrupted"), "{stderr}");
        assert!(stderr.lines().last().unwrap().starts_with("hint: "), "{stderr}");
    }
}

/// A chat goes on when Ctrl-C cuts what it does: reading a document, reading a message, writing a reply.
#[test]
fn ctrl_c_while_a_chat_reads_and_writes() {
    const AT_ONCE: Duration = Duration::from_secs(1);
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
         {% if add_generation_prompt %}<assistant>{% endif %}";
    let dir = chat_dir(template);
    fs::write(dir.path().join("long.txt"), words(400_000)).unwrap();
    fs::write(dir.path().join("short.txt"), words(3_000)).unwrap();
    let mut chat = Command::new(BINARY);
    chat.current_dir(dir.path()).env("STILL_CACHE", dir.path()).env("HF_HUB_OFFLINE", "1");
    chat.args(["chat", "--model", "student", "--temperature", "0", "-n", "1000000"]);
    let mut chat = Terminal::start(chat, 80);
    chat.until_prompt();
    let cut = |chat: &mut Terminal, doing: &str, said: &str| {
        chat.until(doing);
        std::thread::sleep(Duration::from_millis(300));
        chat.send(CTRL_C);
        let took = chat.until(said);
        assert!(took < AT_ONCE, "{took:?}: {}", chat.screen());
        chat.until_prompt();
    };
    chat.send(&format!("/file long.txt{ENTER}"));
    cut(&mut chat, "Reading", "cut by Ctrl-C: the document is forgotten, the chat goes on");
    chat.send(&format!("Why{ENTER}"));
    cut(&mut chat, "!!!!!!!!", "cut short by Ctrl-C");
    // A message is read again from the conversation's beginning, which is long by now.
    chat.send(&format!("/file short.txt{ENTER}"));
    chat.until("Reading short.txt: ");
    chat.until_prompt();
    chat.send(&format!("/system Be brief.{ENTER}"));
    chat.until("reads everything again");
    chat.until_prompt();
    chat.send(&format!("/clear{ENTER}"));
    chat.until("Cleared");
    chat.until_prompt();
    chat.send(CTRL_D);
    assert_eq!(chat.code(), 0);
}

/// One message that was piped in ends as other commands do.
#[test]
fn ctrl_c_while_a_piped_message_is_read() {
    let model = chat_dir("{{ messages[-1].content }}");
    let (message, log) = (model.path().join("message.txt"), model.path().join("log"));
    fs::write(&message, words(400_000)).unwrap();
    let mut command = still(&["chat", "-n", "5", "--model"]);
    command.arg(model.path().join("student")).stdin(fs::File::open(&message).unwrap());
    let child = command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    until("the model is loaded", || said(&log, "Loaded"));
    std::thread::sleep(Duration::from_millis(700));
    let sent = Instant::now();
    send(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
    let stderr = fs::read_to_string(&log).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("error: interrupted"), "{stderr}");
}

const RUN: [&str; 8] = [
    "--set",
    "data.length=128",
    "--set",
    "transfer.steps=100000",
    "--set",
    "finetune.steps=0",
    "--no-tensorboard",
    "--set=checkpoint.every=50000",
];

fn training(dir: &Path, more: &[&str]) -> Command {
    let data = dir.join("data.txt");
    fs::write(&data, words(2000)).unwrap();
    let mut command = still(&[]);
    command.args(linearize_args(teacher_dir(), &data, &dir.join("student"))).args(RUN).args(more);
    command.env("STILL_CACHE", dir.join("cache"));
    command
}

fn steps_done(dir: &Path) -> usize {
    fs::read_to_string(dir.join("student.run/metrics.jsonl")).unwrap_or_default().lines().count()
}

/// Whoever ends a run, it is saved; `nohup` keeps a run from the end of its terminal.
#[test]
fn every_signal_saves_a_run() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        let dir = tempfile::tempdir().unwrap();
        let child = training(dir.path(), &[]).spawn().unwrap();
        until("some steps are done", || steps_done(dir.path()) > 2);
        send(&child, signal);
        let output = child.wait_with_output().unwrap();
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{signal}: {stderr}");
        assert!(stderr.contains("Stopping after this step"), "{stderr}");
        assert!(stderr.contains("error: stopped at transfer step "), "{stderr}");
        assert!(stderr.contains("--resume"), "{stderr}");
        let checkpoints = dir.path().join("student.run/checkpoints").read_dir().unwrap();
        assert_eq!(checkpoints.count(), 1, "{signal}");
        assert!(!dir.path().join("student").exists());
    }
}

#[test]
fn a_run_under_nohup_outlives_its_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let run = training(dir.path(), &[]);
    let mut nohup = Command::new("nohup");
    nohup.arg(BINARY).args(run.get_args()).env("STILL_CACHE", dir.path().join("cache"));
    nohup.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = nohup.spawn().unwrap();
    until("some steps are done", || steps_done(dir.path()) > 2);
    send(&child, "-HUP");
    let then = steps_done(dir.path());
    until("it goes on", || {
        assert!(child.try_wait().unwrap().is_none(), "SIGHUP ended it");
        steps_done(dir.path()) > then + 20
    });
    send(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

/// What has nothing to save ends at once: here a bench of a long context.
#[test]
fn what_saves_nothing_ends_at_once() {
    let mut command =
        still(&["bench", "model", "--contexts", "300000", "--variants", "dense", "--model"]);
    let child = command.arg(teacher_dir()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let sent = Instant::now();
    send(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert!(sent.elapsed() < Duration::from_secs(3), "{:?}", sent.elapsed());
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("error: interrupted by Ctrl-C\nhint: "),
        "{}",
        stderr(&output)
    );
}

/// A stderr that nobody reads does not hold up the end.
#[test]
fn a_stderr_that_takes_nothing_holds_up_no_signal() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    // Full to the brim.
    let chunk = [b'x'; 1024];
    let fill = std::thread::spawn({
        let mut writer = writer.try_clone().unwrap();
        move || while writer.write_all(&chunk).is_ok() {}
    });
    std::thread::sleep(Duration::from_millis(200));
    let mut command =
        still(&["bench", "model", "-q", "--contexts", "300000", "--variants", "dense"]);
    command.arg("--model").arg(teacher_dir()).stderr(writer.try_clone().unwrap());
    let child = command.spawn().unwrap();
    drop(command);
    std::thread::sleep(Duration::from_millis(500));
    let sent = Instant::now();
    send(&child, "-INT");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    assert!(sent.elapsed() < Duration::from_secs(3), "{:?}", sent.elapsed());
    drop(reader);
    fill.join().unwrap();
    let _ = writer.flush();
}
