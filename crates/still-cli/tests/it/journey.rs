//! The way of the README's first page, on a narrow and a wide terminal with small models: a question about a document, the next
//! one from a session, a chat, a student of one's own with a verdict, and going on after Ctrl-C.
//!
//! `scripts/first_hour.sh` goes the same way with the model that ships, whose answers are worth reading.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::chat::TEMPLATE;
use crate::common::terminal::{CTRL_C, ENTER, Terminal};
use crate::common::{BINARY, chat_dir, teacher_dir, words};

fn still(home: &Path, columns: u16, line: &[&str]) -> Terminal {
    let mut command = Command::new(BINARY);
    command.current_dir(home).env("STILL_CACHE", home.join("cache")).env("HF_HUB_OFFLINE", "1");
    command.env_remove("NO_COLOR").args(line);
    Terminal::start(command, columns)
}

/// The screen of a command that has ended: text without escape sequences or bars, every row within the terminal.
#[track_caller]
fn left(terminal: &mut Terminal, code: i32) -> String {
    assert_eq!(terminal.code(), code, "{}", terminal.screen());
    let screen = terminal.screen();
    assert!(!screen.contains(['\u{1b}', '\r']) && !screen.contains("[2K"), "{screen}");
    assert!(!screen.contains("=>") && !screen.contains("[>"), "a bar is left:\n{screen}");
    // A command that is copied stays whole.
    let rows = terminal.rows_too_long();
    assert!(rows.iter().all(|row| row.starts_with("  still ")), "{rows:#?}\n{screen}");
    screen
}

#[track_caller]
fn has(screen: &str, parts: &[&str]) {
    for part in parts {
        assert!(screen.contains(part), "no {part:?}:\n{screen}");
    }
}

/// What `linearize` learns in a few seconds, by the recipe that is usual for a CPU.
const RUN: [&str; 14] = [
    "--set",
    "calibration.cache_fraction=0.6",
    "--set",
    "calibration.at_length=512",
    "--set",
    "calibration.tokens=2048",
    "--set",
    "calibration.window=512",
    "--set",
    "data.length=128",
    "--set",
    "transfer.steps=400",
    "--set",
    "finetune.steps=2",
];

const FACT: &str = "The report was signed by Maria Okafor.";

#[test]
fn a_newcomer_comes_from_a_document_to_a_student() {
    for columns in [80, 200] {
        let dir = chat_dir(TEMPLATE);
        let home = dir.path();
        let report = format!("{}. {FACT} {}.", words(30), words(20));
        fs::write(home.join("report.txt"), report).unwrap();
        fs::write(home.join("own.txt"), words(20_000)).unwrap();
        let question = "Who signed it?";

        // A question about a document; the state is kept.
        let line =
            ["ask", "-m", "student", "-n", "5", "--file", "report.txt", "--session", "r.still"];
        let mut ask = still(home, columns, &[&line[..], &[question]].concat());
        ask.until("     Reading report.txt");
        let screen = left(&mut ask, 0);
        has(&screen, &["Reading report.txt: ", "Saved r.still", "\n!!!!!\n", "first token after "]);
        has(&screen, &["cache ", " dense, ", "/s"]);

        // The next one reads nothing again.
        let line = ["ask", "-m", "student", "-n", "5", "--session", "r.still", "And who else?"];
        let mut again = still(home, columns, &line);
        let screen = left(&mut again, 0);
        has(&screen, &["Opened r.still: ", "\n!!!!!\n"]);
        assert!(!screen.contains("Reading"), "{screen}");

        let line = ["chat", "-m", "student", "-n", "5", "--temperature", "0"];
        let mut chat = still(home, columns, &line);
        chat.until_prompt();
        chat.send(&format!("{question}{ENTER}"));
        chat.until("\n!!!!!\n");
        chat.until_prompt();
        chat.send(&format!("/quit{ENTER}"));
        left(&mut chat, 0);

        // A student of their own; Ctrl-C on the way.
        let teacher = teacher_dir().to_str().unwrap();
        let line = ["linearize", "-m", teacher, "-d", "own.txt", "-o", "mine"];
        let line = [&line[..], &RUN].concat();
        let mut run = still(home, columns, &line);
        run.until("    Training transfer [");
        for _ in 0..50 {
            assert!(!run.wraps(), "{}", run.screen());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        run.send(CTRL_C);
        run.until("Stopping after this step, which is then saved; once more to end at once");
        let screen = left(&mut run, 1);
        has(&screen, &["Recipe quick", "Calibrating losses on text: done", "error: stopped at"]);
        has(&screen, &["hint: ", "--resume"]);
        assert!(!home.join("mine").exists());

        let mut resumed = still(home, columns, &[&line[..], &["--resume"]].concat());
        let screen = left(&mut resumed, 0);
        let verdict = ["teacher", "untrained", "trained", "held-out perplexity", "Next:"];
        has(&screen, &verdict);
        has(&screen, &["still chat --model mine", "still report run mine.run"]);
        // Of the whole run, whichever start did it.
        let told = resumed.bytes();
        has(&told, &["transfer: 400 steps, loss ", "finetune: 2 steps, loss "]);
        has(&told, &["both losses on the windows of the first step"]);

        let mut talk =
            still(home, columns, &["generate", "-m", "mine", "-n", "3", "--prompt", "x"]);
        left(&mut talk, 0);
    }
}
