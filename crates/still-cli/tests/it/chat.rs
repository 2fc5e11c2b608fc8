//! `still chat` in pipes: one message, and conversations that a session keeps.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::common::{Outcome, chat_dir, still, words};

pub const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                            {% if add_generation_prompt %}<assistant>{% endif %}";

/// A student that answers with exclamation marks, and a place for a session.
struct Talk {
    dir: TempDir,
    session: PathBuf,
}

impl Talk {
    fn new(template: &str) -> Self {
        let dir = chat_dir(template);
        let session = dir.path().join("talk.still");
        Self { dir, session }
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("student")
    }

    /// One message that comes through a pipe.
    fn say(&self, message: &str, more: &[&str]) -> Outcome {
        let mut chat = still();
        chat.args(["chat", "-n", "5", "--temperature", "0", "--model"]).arg(self.model());
        Outcome::of(chat.args(more).write_stdin(message))
    }

    /// One that the session keeps.
    fn go_on(&self, message: &str, more: &[&str]) -> Outcome {
        let session = ["--session", self.session.to_str().unwrap()];
        self.say(message, &[&session[..], more].concat())
    }
}

/// `N` of the notes `N tokens read`.
#[track_caller]
fn tokens_read(outcome: &Outcome) -> usize {
    outcome.succeeded();
    assert_eq!(outcome.stdout, "!!!!!\n");
    let note = |line: &str| line.split_once(" tokens read")?.0.trim().parse().ok();
    let read: Vec<usize> = outcome.stderr.lines().filter_map(note).collect();
    assert_eq!(read.len(), 1, "{}", outcome.stderr);
    read[0]
}

#[test]
fn what_is_piped_in_is_one_message() {
    let talk = Talk::new(TEMPLATE);
    let lines = talk.say("Why\nAnd then\n\nand /help\n", &[]);
    let one = talk.say("Why", &[]);
    assert!(tokens_read(&lines) > tokens_read(&one) + 10);
    // A slash is no command there.
    tokens_read(&talk.say("/quit", &[]));
    talk.say(" \n", &[]).failed_with("standard input has no message");
}

#[test]
fn a_session_goes_on_where_it_was_and_reads_only_what_is_new() {
    let talk = Talk::new(TEMPLATE);
    let first = talk.go_on("Tell me about the sea and the ships that sail on it", &[]);
    let reads = [first, talk.go_on("Why", &[]), talk.go_on("And then", &[])];
    let read = reads.each_ref().map(tokens_read);
    assert!(read[1] < read[0] && read[2] < read[0], "{read:?}");
    for outcome in &reads[1..] {
        assert!(outcome.stderr.contains("Opened"), "{}", outcome.stderr);
        assert!(!outcome.stderr.contains("read again"), "{}", outcome.stderr);
    }
    // It was written over each time.
    let left: Vec<_> =
        talk.dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_template_that_rewrites_history_is_told_across_processes() {
    // Only the last message is rendered: earlier turns are dropped.
    let talk = Talk::new(
        "{{ messages | length }}: {{ messages[-1].content }}{% if add_generation_prompt %} >{% endif %}",
    );
    tokens_read(&talk.go_on("Tell me about the sea and the ships that sail on it", &[]));
    for message in ["Why", "And then"] {
        let later = talk.go_on(message, &[]);
        tokens_read(&later);
        assert_eq!(later.stderr.matches("read again").count(), 1, "{}", later.stderr);
    }
}

#[test]
fn ask_and_chat_take_each_others_sessions() {
    let talk = Talk::new(TEMPLATE);
    let file = talk.dir.path().join("a.txt");
    std::fs::write(&file, words(300)).unwrap();
    let (file, session) = (file.to_str().unwrap(), talk.session.to_str().unwrap());
    let ask = |more: &[&str]| {
        let mut ask = still();
        ask.args(["ask", "-n", "5", "--json", "--model"]).arg(talk.model()).args(more);
        Outcome::of(&mut ask)
    };
    let asked = ask(&["--file", file, "--session", session, "Who sails?"]);
    asked.succeeded();
    // The chat's first message is about the document that `ask` read, and only the question is read.
    let first = talk.go_on("Who sails?", &["--file", file]);
    assert_eq!(Some(tokens_read(&first) as u64), asked.json()["question_tokens"].as_u64());
    assert!(!first.stderr.contains("Reading"), "{}", first.stderr);
    // What was said since is there, and asking changes nothing of it.
    let later = ask(&["--session", session, "Who sails?"]);
    later.succeeded();
    assert!(later.json()["document_tokens"].as_u64() > asked.json()["document_tokens"].as_u64());
    let before = std::fs::read(&talk.session).unwrap();
    ask(&["--session", session, "--file", file, "Why?"]).succeeded();
    assert_eq!(std::fs::read(&talk.session).unwrap(), before);
}

#[test]
fn a_document_is_read_before_the_first_message() {
    let talk = Talk::new(TEMPLATE);
    let file = talk.dir.path().join("a.txt");
    std::fs::write(&file, words(300)).unwrap();
    let file = ["--file", file.to_str().unwrap()];
    let first = talk.go_on("Who sails?", &file);
    assert!(first.stderr.contains("Reading"), "{}", first.stderr);
    assert!(tokens_read(&first) < 40);
    let again = talk.go_on("Why?", &file);
    assert!(tokens_read(&again) < 40 && !again.stderr.contains("Reading"), "{}", again.stderr);
    assert!(again.stderr.contains(" dense, "), "{}", again.stderr);
    let missing = talk.say("Why?", &["--file", "no-such-file"]);
    missing.failed_with("no-such-file");
    assert!(!missing.stderr.contains("Loading"), "{}", missing.stderr);
}

#[test]
fn a_session_of_something_else_is_refused() {
    let talk = Talk::new(TEMPLATE);
    tokens_read(&talk.go_on("Why", &["--system", "Be brief."]));
    talk.go_on("Why", &["--system", "Be long."]).failed_with("another system message");
    tokens_read(&talk.go_on("Why", &["--system", "Be brief."]));
    let rows = talk.go_on("Why", &["--cache-dtype", "int8"]);
    rows.failed_with("--cache-dtype is int8, and the session");
    tokens_read(&talk.go_on("Why", &["--cache-dtype", "bf16"]));

    let good = std::fs::read(&talk.session).unwrap();
    let mut bytes = good.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&talk.session, bytes).unwrap();
    talk.go_on("Why", &[]).failed_with("damaged");
    // Nobody's file is written over.
    std::fs::write(&talk.session, "mine").unwrap();
    talk.go_on("Why", &[]).failed_with("is not a session that still wrote");
    assert_eq!(std::fs::read(&talk.session).unwrap(), b"mine");
    let nowhere = talk.say("Why", &["--session", "/missing/talk.still"]);
    nowhere.failed_with("nothing can be written in");
}

#[test]
fn a_chats_sampling_is_what_the_models_makers_suggest() {
    let talk = Talk::new(TEMPLATE);
    let config = |json: &str| std::fs::write(talk.model().join("generation_config.json"), json);
    let say = |more: &[&str]| {
        let mut chat = still();
        chat.args(["chat", "-n", "5", "--model"]).arg(talk.model()).args(more);
        Outcome::of(chat.write_stdin("Why"))
    };
    // All logits are equal: whoever samples says something else than exclamation marks.
    config(r#"{ "do_sample": true, "temperature": 0.7 }"#).unwrap();
    let sampled = say(&[]);
    sampled.succeeded();
    assert_ne!(sampled.stdout, "!!!!!\n");
    assert_eq!(say(&[]).stdout, sampled.stdout);
    assert_ne!(say(&["--seed", "1"]).stdout, sampled.stdout);
    config(r#"{ "do_sample": true, "top_k": 1 }"#).unwrap();
    assert_eq!(say(&[]).stdout, "!!!!!\n");
    config(r#"{ "do_sample": true, "top_p": 7 }"#).unwrap();
    say(&[]).failed_with("top_p");
    assert_eq!(say(&["--temperature", "0"]).stdout, "!!!!!\n");
}

#[test]
fn penalties_and_biases_change_greedy_text() {
    let model = crate::common::student_dir();
    let generate = |more: &[&str]| {
        let mut generate = still();
        generate.args(["generate", "-n", "24", "--prompt", "The sea", "--model"]).arg(model);
        let outcome = Outcome::of(generate.args(more));
        outcome.succeeded();
        outcome.stdout
    };
    let greedy = generate(&[]);
    for penalty in ["--repetition-penalty", "--presence-penalty", "--frequency-penalty"] {
        assert_ne!(generate(&[penalty, "50"]), greedy, "{penalty}");
    }
    assert_eq!(generate(&["--repetition-penalty", "1"]), greedy);
    assert_eq!(generate(&["--logit-bias", "7=0"]), greedy);
    let biased = generate(&["--logit-bias", "65=100"]);
    assert_eq!(generate(&["--logit-bias", "66=-100", "--logit-bias", "65=100"]), biased);
    assert!(![greedy.clone(), generate(&["--logit-bias", "66=100"])].contains(&biased));
    for (bias, why) in [
        ("65", "a token's id, `=` and a number"),
        ("65=101", "from -100 to 100"),
        ("-1=3", "a token's id"),
        ("99999=1", "there is no token 99999"),
    ] {
        let mut wrong = still();
        wrong.args(["generate", "--prompt", "x", "--model"]).arg(model);
        Outcome::of(wrong.arg(format!("--logit-bias={bias}"))).failed_with(why);
    }
    let nothing = ["generate", "--prompt", "x", "--min-p", "0.1", "--model"];
    Outcome::of(still().args(nothing).arg(Path::new("m")))
        .failed_with("do nothing at temperature 0");
}
