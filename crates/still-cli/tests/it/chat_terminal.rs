//! `still chat` on a terminal, narrow and wide: what the screen shows.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::chat::TEMPLATE;
use crate::common::terminal::{CTRL_C, CTRL_D, ENTER, TAB, Terminal, UP};
use crate::common::{BINARY, chat_dir, words};
use crate::streams::student_of_escapes;

/// `still chat` in a directory that has a model, `student`, and is its cache too.
fn start(dir: &Path, columns: u16, more: &[&str]) -> Terminal {
    let mut chat = Command::new(BINARY);
    chat.current_dir(dir).env("STILL_CACHE", dir).env("HF_HUB_OFFLINE", "1").env("NO_COLOR", "1");
    chat.args(["chat", "--model", "student", "--temperature", "0"]).args(more);
    let mut terminal = Terminal::start(chat, columns);
    terminal.until("/help lists commands");
    terminal.until_prompt();
    terminal
}

/// Types a line and waits for what it brings.
#[track_caller]
fn line(terminal: &mut Terminal, text: &str, expected: &str) {
    let before = terminal.screen().matches(expected).count();
    terminal.send(text);
    terminal.send(ENTER);
    terminal.until_times(expected, before + 1);
    terminal.until_prompt();
}

#[test]
fn every_command_does_what_it_says() {
    for columns in [80, 200] {
        let dir = chat_dir(TEMPLATE);
        std::fs::write(dir.path().join("a report.txt"), words(40)).unwrap();
        let mut chat = start(dir.path(), columns, &["-n", "5"]);
        let chat = &mut chat;
        assert!(chat.screen().contains("sampling: greedy"), "{}", chat.screen());
        line(chat, "Why", "\n!!!!!\n");
        let screen = chat.screen();
        for part in [
            " tokens read, first token after ",
            " written at ",
            "cache ",
            " dense, ",
            "ended by --max-new-tokens",
        ] {
            assert!(screen.contains(part), "no {part}:\n{screen}");
        }
        assert!(!chat.wraps(), "{screen}");
        line(chat, "/help", "/quit           end the chat");
        line(chat, "/stats", "1 message, ");
        line(chat, "/nosuch x", "error: there is no command /nosuch");
        line(chat, "/file no.txt", "error: cannot read no.txt");
        line(chat, "/file a\\ report.txt", "Reading a report.txt: ");
        line(chat, "/stats", ", a document to ask about");
        line(chat, "Who sails?", "\n!!!!!\n");
        line(chat, "/save talk.still", "Saved talk.still");
        line(chat, "/clear", "Cleared");
        line(chat, "/stats", "0 messages, 0 tokens");
        line(chat, "/save", "error: /save needs a file");
        line(chat, "/load talk.still", "Loaded talk.still: ");
        line(chat, "/stats", "2 messages, ");
        line(chat, "/system Be brief.", "the next message reads everything again");
        line(chat, "And now?", "read again");
        assert!(!chat.wraps(), "{}", chat.screen());
        line(chat, "/save a\\ report.txt", "exists and is not a session that still wrote");
        chat.send("/quit");
        chat.send(ENTER);
        assert_eq!(chat.code(), 0);
    }
}

#[test]
fn a_document_takes_the_place_of_one_that_was_not_asked_about() {
    let dir = chat_dir(TEMPLATE);
    std::fs::write(dir.path().join("a.txt"), words(40)).unwrap();
    let mut chat = start(dir.path(), 80, &["-n", "5"]);
    let chat = &mut chat;
    line(chat, "/file a.txt", "Reading a.txt: ");
    // Nothing was said that could be read again.
    line(chat, "/file a.txt", "this one takes its place");
    assert!(!chat.screen().contains("read again"), "{}", chat.screen());
    line(chat, "Who sails?", "\n!!!!!\n");
    line(chat, "/file a.txt", "Reading a.txt: ");
    line(chat, "/file a.txt", "this one takes its place");
    assert_eq!(chat.screen().matches("read again").count(), 1, "{}", chat.screen());
    line(chat, "/load a.txt", "error: a.txt: not a session");
}

#[test]
fn several_lines_are_one_message() {
    let dir = chat_dir(TEMPLATE);
    let mut chat = start(dir.path(), 80, &["-n", "5"]);
    let chat = &mut chat;
    line(chat, "\x1b[200~one\ntwo\r\nthree\x1b[201~", "\n!!!!!\n");
    chat.send("four\\");
    chat.send(ENTER);
    line(chat, "five", "\n!!!!!\n");
    line(chat, "/stats", "2 messages, ");
    assert_eq!(chat.screen().matches("tokens read").count(), 2, "{}", chat.screen());
    assert!(chat.screen().contains("> one\ntwo\nthree\n!!!!!"), "{}", chat.screen());
    // What is pasted may begin with a slash.
    line(chat, "\x1b[200~/help or\n/not\x1b[201~", "\n!!!!!\n");
    line(chat, "/stats", "3 messages, ");
}

#[test]
fn what_was_typed_is_recalled_in_this_chat_and_the_next() {
    let dir = chat_dir(TEMPLATE);
    let mut chat = start(dir.path(), 80, &["-n", "5"]);
    line(&mut chat, "Who sails the sea?", "tokens read");
    chat.send(UP);
    chat.until_times("> Who sails the sea?", 2);
    // Ctrl-U empties the line.
    chat.send("\x15/st");
    chat.send(TAB);
    line(&mut chat, "", "1 message, ");
    // A line that begins with a space is not remembered.
    line(&mut chat, " secret", "tokens read");
    chat.send(CTRL_D);
    assert_eq!(chat.code(), 0);
    let remembered = dir.path().join("chat_history");
    assert!(!std::fs::read_to_string(&remembered).unwrap().contains("secret"));
    assert_eq!(remembered.metadata().unwrap().permissions().mode() & 0o077, 0);
    let mut next = start(dir.path(), 80, &["-n", "5"]);
    next.send(UP);
    next.until("> /stats");
    next.send(UP);
    next.until("> Who sails the sea?");
    drop(next);
    let mut unknown = start(dir.path(), 80, &["-n", "5", "--no-history"]);
    unknown.send(UP);
    line(&mut unknown, "/stats", "0 messages");
}

#[test]
fn what_is_typed_during_a_reply_waits_for_its_end() {
    let dir = chat_dir(TEMPLATE);
    let mut chat = start(dir.path(), 80, &["-n", "900"]);
    chat.send(&format!("Why{ENTER}"));
    chat.until("!!!!");
    line(&mut chat, "/stats", "1 message, ");
    let screen = chat.screen();
    assert_eq!(screen.matches("/stats").count(), 1, "{screen}");
    assert!(screen.contains("> /stats"), "{screen}");
}

#[test]
fn ctrl_c_at_the_prompt_says_how_to_leave() {
    let dir = chat_dir(TEMPLATE);
    let mut chat = start(dir.path(), 80, &["-n", "5"]);
    let chat = &mut chat;
    chat.send("never mind");
    chat.send(CTRL_C);
    chat.until("Ctrl-C once more, Ctrl-D or /quit ends the chat");
    chat.until_prompt();
    line(chat, "Why", "\n!!!!!\n");
    // Not one after another: said again.
    chat.send(CTRL_C);
    chat.until_times("once more", 2);
    chat.until_prompt();
    chat.send(CTRL_C);
    assert_eq!(chat.code(), 0);
    assert!(chat.screen().contains("ended by Ctrl-C"), "{}", chat.screen());
}

#[test]
fn what_a_model_writes_steers_no_terminal() {
    let dir = student_of_escapes();
    let config = serde_json::json!({ "chat_template": TEMPLATE });
    std::fs::write(dir.path().join("student/tokenizer_config.json"), config.to_string()).unwrap();
    let mut chat = start(dir.path(), 80, &["-n", "3"]);
    line(&mut chat, "Why", r"\u{1b}\u{1b}\u{1b}");
    let bytes = chat.bytes();
    assert!(!bytes.contains("\x1b\x1b"), "{bytes:?}");
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    let dir = chat_dir(TEMPLATE);
    let mut chat = start(dir.path(), 80, &["-n", "5", "--session", "talk.still"]);
    line(&mut chat, "Why", "\n!!!!!\n");
    let modes = libc::ICANON | libc::ECHO | libc::ISIG;
    assert_eq!(chat.local_modes() & modes, 0, "the editor has the terminal");
    let sent = Command::new("kill").args(["-TERM", &chat.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(chat.code(), 143);
    assert_eq!(chat.local_modes() & modes, modes);
    let screen = chat.screen();
    assert!(screen.contains("error: interrupted by SIGTERM"), "{screen}");
    assert!(screen.contains("talk.still has the conversation up to the last reply"), "{screen}");
    let mut next = start(dir.path(), 80, &["-n", "5", "--session", "talk.still"]);
    line(&mut next, "/stats", "1 message, ");
}

#[test]
fn ask_fits_a_narrow_terminal() {
    let dir = chat_dir(TEMPLATE);
    std::fs::write(dir.path().join("a.txt"), words(40)).unwrap();
    for columns in [80, 200] {
        let mut ask = Command::new(BINARY);
        ask.current_dir(dir.path()).env("HF_HUB_OFFLINE", "1");
        ask.args(["ask", "--model", "student", "--file", "a.txt", "-n", "5", "Why?"]);
        let mut ask = Terminal::start(ask, columns);
        assert_eq!(ask.code(), 0);
        let screen = ask.screen();
        for part in ["Reading a.txt: ", "\n!!!!!\n", "first token after ", " dense, "] {
            assert!(screen.contains(part), "no {part}:\n{screen}");
        }
        assert!(!ask.wraps(), "{screen}");
    }
}
