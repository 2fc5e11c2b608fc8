//! `still ask`: answers about a document, the session that keeps what was read, and what is refused.

use std::path::Path;

use crate::common::{Outcome, chat_dir, still, words};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";

fn ask(model: &Path, extra: &[&str]) -> Outcome {
    Outcome::of(still().args(["ask", "-n", "5", "--model"]).arg(model).args(extra))
}

#[test]
fn a_document_is_read_once() {
    let dir = chat_dir(TEMPLATE);
    let model = dir.path().join("student");
    let (file, session) = (dir.path().join("a.txt"), dir.path().join("a.still"));
    std::fs::write(&file, words(300)).unwrap();
    let (file, session) = (file.to_str().unwrap(), session.to_str().unwrap());

    let once = ask(&model, &["--file", file, "--json", "Who sails?"]);
    once.succeeded();
    let first = ask(&model, &["--file", file, "--session", session, "--json", "Who sails?"]);
    first.succeeded();
    assert!(first.stderr.contains("Saved"), "{}", first.stderr);
    let again = ask(&model, &["--session", session, "--json", "Who sails?"]);
    again.succeeded();
    assert!(again.stderr.contains("Opened") && !again.stderr.contains("Reading"));
    for report in [first.json(), again.json()] {
        for key in ["text", "document_tokens", "question_tokens", "cache_bytes"] {
            assert_eq!(report[key], once.json()[key], "{key}");
        }
    }
    let report = again.json();
    assert_eq!(report["text"], "!!!!!");
    // Only the question and the template's end are read.
    assert!(report["question_tokens"].as_u64() < Some(40), "{report}");
    assert!(report["document_tokens"].as_u64() > Some(300), "{report}");

    // A question does not change what the next one sees.
    let other = ask(&model, &["--session", session, "--json", "Why?"]);
    other.succeeded();
    let same = ask(&model, &["--session", session, "--file", file, "--json", "Who sails?"]);
    same.succeeded();
    assert_eq!(same.json()["question_tokens"], report["question_tokens"]);
}

#[test]
fn text_streams_and_the_cache_is_compared_with_a_dense_one() {
    let dir = chat_dir(TEMPLATE);
    let model = dir.path().join("student");
    let piped = Outcome::of(
        still()
            .args(["ask", "-n", "5", "Why?", "--system", "Be brief.", "--model"])
            .arg(&model)
            .write_stdin(words(200)),
    );
    piped.succeeded();
    assert_eq!(piped.stdout, "!!!!!\n");
    for part in ["Reading standard input", "first token after", " dense, ", "ended by --max-new"] {
        assert!(piped.stderr.contains(part), "{part}: {}", piped.stderr);
    }
}

#[test]
fn a_session_of_something_else_is_refused() {
    let dir = chat_dir(TEMPLATE);
    let model = dir.path().join("student");
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (file, other, session) = (path("a.txt"), path("b.txt"), path("a.still"));
    std::fs::write(&file, words(100)).unwrap();
    std::fs::write(&other, words(101)).unwrap();
    ask(&model, &["--file", &file, "--session", &session, "Who?"]).succeeded();

    let refused = ask(&model, &["--file", &other, "--session", &session, "Who?"]);
    refused.failed_with("another document");
    ask(&model, &["--system", "Be brief.", "--session", &session, "Who?"])
        .failed_with("another system message");
    let second = chat_dir(TEMPLATE);
    let changed = second.path().join("student");
    let config = std::fs::read_to_string(changed.join("config.json")).unwrap();
    let eps = config.replace("\"rms_norm_eps\": 0.00001", "\"rms_norm_eps\": 0.00002");
    assert_ne!(eps, config);
    std::fs::write(changed.join("config.json"), eps).unwrap();
    ask(&changed, &["--session", &session, "Who?"]).failed_with("a session of another model");

    let mut bytes = std::fs::read(&session).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&session, bytes).unwrap();
    let damaged = ask(&model, &["--session", &session, "Who?"]);
    damaged.failed_with("damaged");
    assert!(damaged.stderr.contains("read the document again"), "{}", damaged.stderr);
    std::fs::write(&session, "no session").unwrap();
    let other = ask(&model, &["--session", &session, "Who?"]);
    other.failed_with("a.still: not a session");
    // Models can be had again; what was read cannot.
    assert!(!other.stderr.contains("fetch or export"), "{}", other.stderr);
}

#[test]
fn a_document_beyond_the_bases_training_is_warned_of_before_it_is_read() {
    let dir = chat_dir(TEMPLATE);
    let model = dir.path().join("student");
    let file = dir.path().join("a.txt");
    let asked = |text: String| {
        std::fs::write(&file, text).unwrap();
        let asked = ask(&model, &["--file", file.to_str().unwrap(), "Who?"]);
        asked.succeeded();
        asked.stderr
    };
    let warning = "the base was trained for 512: expect worse answers";
    let told = asked(words(100));
    let at = |part: &str| told.find(part).unwrap_or_else(|| panic!("no {part}: {told}"));
    assert!(at(warning) < at("     Reading "), "{told}");
    assert!(!asked(words(20)).contains(warning));
}

#[test]
fn what_cannot_be_asked_is_said() {
    let dir = chat_dir(TEMPLATE);
    let model = dir.path().join("student");
    let file = dir.path().join("a.txt");
    std::fs::write(&file, " \n").unwrap();
    let file = file.to_str().unwrap();
    ask(&model, &["--file", file, "Who?"]).failed_with("the document is empty");
    ask(&model, &["Who?"]).failed_with("there is no document: standard input is empty");
    let mistyped = dir.path().join("no.still");
    ask(&model, &["--session", mistyped.to_str().unwrap(), "Who?"])
        .failed_with("there is no session ");
    ask(&model, &["--file", file, "  "]).failed_with("the question is empty");
    ask(&model, &["--file", "no-such-file", "Who?"]).failed_with("no-such-file");
    std::fs::write(file, words(20)).unwrap();
    // Before anything is read that could not be kept.
    let nowhere = dir.path().join("missing/a.still");
    let refused = ask(&model, &["--file", file, "--session", nowhere.to_str().unwrap(), "Who?"]);
    refused.failed_with("nothing can be written in");
    assert!(!refused.stderr.contains("Loading"), "{}", refused.stderr);
    std::fs::write(model.join("tokenizer_config.json"), "{}").unwrap();
    ask(&model, &["--file", file, "Who?"]).failed_with("no chat template");
}
