//! Conversations that are saved, opened, asked, cut and cleared: the state is that of a conversation that never stopped.

use std::ops::ControlFlow;
use std::path::Path;

use still_attention::{RowDtype, StillConfig};
use still_model::random::{random_model, tiny_config, tiny_sliding_config};
use still_model::{
    Cancel, ChatSession, FeatureInit, GenerateOptions, Model, ModelConfig, ModelError, Student,
};

/// Models that never end by themselves: dense, a student, and one of layers with a sliding window.
fn models() -> Vec<Model> {
    let teacher = random_model(ModelConfig { eos_token_ids: vec![], ..tiny_config() }, 4).unwrap();
    let config = teacher.config();
    let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 8, 2);
    let student = Student::init(still, config, FeatureInit::Normal, 5).unwrap();
    let sliding = ModelConfig { eos_token_ids: vec![], ..tiny_sliding_config() };
    vec![teacher.with_student(student), random_model(sliding, 4).unwrap(), teacher]
}

fn options(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, ..Default::default() }
}

#[track_caller]
fn send(session: &mut ChatSession, text: &str) -> Vec<u32> {
    let reply = session.send(text, &options(6), &mut |_| ControlFlow::Continue(())).unwrap();
    reply.generation.ids
}

#[track_caller]
fn ask(session: &ChatSession, text: &str) -> Vec<u32> {
    let reply = session.ask(text, &options(6), &mut |_| ControlFlow::Continue(())).unwrap();
    reply.generation.ids
}

fn read(session: &mut ChatSession, text: &str) -> still_model::Result<bool> {
    session.read_document(text.into(), &Cancel::default(), |_, _| {})
}

fn document() -> String {
    "The ship sails at noon. The wind is from the north. ".repeat(6)
}

#[test]
fn a_session_from_a_file_goes_on_as_if_it_had_never_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.still");
    for model in models() {
        for rows in [RowDtype::Bf16, RowDtype::Int8, RowDtype::F32] {
            let mut session = ChatSession::new(model.clone(), rows, Some("Be brief.")).unwrap();
            read(&mut session, &document()).unwrap();
            let reopen = |session: &ChatSession| {
                session.save(&path).unwrap();
                let opened = ChatSession::open(model.clone(), &path).unwrap();
                assert_eq!(opened.messages(), session.messages());
                assert_eq!(opened.document(), session.document());
                assert_eq!((opened.rows(), opened.tokens()), (rows, session.tokens()));
                // A sliding window keeps some rows beyond its own for a while, and saves none of them.
                assert!(opened.cache_bytes() <= session.cache_bytes());
                opened
            };
            let mut opened = reopen(&session);
            assert!(opened.knows(&document()));
            for text in ["Who?", "And when?"] {
                assert_eq!(send(&mut opened, text), send(&mut session, text));
                opened = reopen(&session);
            }
            assert!(opened.knows(&document()) && !opened.knows("The ship"));
        }
    }
}

#[test]
fn asking_changes_nothing_and_nothing_is_read_twice() {
    for model in models() {
        let mut session = ChatSession::new(model.clone(), RowDtype::F32, None).unwrap();
        read(&mut session, &document()).unwrap();
        let read_before = session.tokens();
        let first = ask(&session, "Who?");
        ask(&session, "What about the wind?");
        assert_eq!(ask(&session, "Who?"), first);
        assert_eq!((session.tokens(), session.messages().len()), (read_before, 0));
        let reply = session.send("Who?", &options(6), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(reply.generation.ids, first);
        assert!(reply.read < 30 && !reply.reread, "{} tokens", reply.read);
        assert_eq!(session.document(), None);
        assert!(session.dense_bytes() > 0 && session.cache_bytes() == reply.cache_bytes);
        // A second document extends the conversation too, if what the random model wrote is text.
        let broken = reply.generation.text.contains(char::REPLACEMENT_CHARACTER);
        assert!(broken || !read(&mut session, "Another text. ").unwrap());
    }
}

#[test]
fn how_a_file_ends_changes_nothing() {
    let model = &models()[0];
    let read = |end: &str, question: &str| {
        let mut session = ChatSession::new(model.clone(), RowDtype::F32, None).unwrap();
        read(&mut session, &format!("{}{end}", document().trim_end())).unwrap();
        assert!(session.knows(&document()) && session.knows(document().trim_end()));
        let found = (session.tokens(), ask(&session, question));
        send(&mut session, question);
        assert!(session.knows(&document()));
        found
    };
    let expected = read("", "Who?");
    for (end, question) in [("\n", "Who?"), ("\r\n\r\n", " Who?\n"), (" ", "Who?")] {
        assert_eq!(read(end, question), expected, "{end:?}");
    }
}

#[test]
fn a_turn_that_fails_leaves_the_conversation_as_it_was() {
    let model = &models()[0];
    let mut session = ChatSession::new(model.clone(), RowDtype::Bf16, None).unwrap();
    read(&mut session, &document()).unwrap();
    send(&mut session, "Who?");
    let (messages, tokens) = (session.messages().to_vec(), session.tokens());
    let next = ask(&session, "Why?");

    let cancel = Cancel::default();
    cancel.raise();
    let cut = GenerateOptions { cancel: cancel.clone(), ..options(6) };
    let long = "Why? ".repeat(300);
    let error = session.send(&long, &cut, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, ModelError::Cancelled), "{error}");
    let error = session.read_document(long, &cancel, |_, _| {}).unwrap_err();
    assert!(matches!(error, ModelError::Cancelled), "{error}");
    let hot = GenerateOptions { temperature: f64::NAN, ..options(6) };
    assert!(session.send("Why?", &hot, &mut |_| ControlFlow::Continue(())).is_err());
    assert_eq!((session.messages(), session.tokens()), (&messages[..], tokens));
    assert_eq!(session.document(), None);
    assert_eq!(ask(&session, "Why?"), next);
}

#[test]
fn what_was_cleared_is_forgotten_but_for_the_system_message() {
    let model = &models()[0];
    let fresh = ChatSession::new(model.clone(), RowDtype::Bf16, Some("Be brief.")).unwrap();
    let mut session = ChatSession::new(model.clone(), RowDtype::Bf16, Some("Be brief.")).unwrap();
    send(&mut session, "Who?");
    read(&mut session, &document()).unwrap();
    session.clear().unwrap();
    assert_eq!(
        (session.tokens(), session.document(), session.system()),
        (0, None, Some("Be brief."))
    );
    assert_eq!(ask(&session, "Who?"), ask(&fresh, "Who?"));
    session.set_system(None);
    assert_eq!((session.system(), session.messages().len()), (None, 0));
    session.set_system(Some("Be long."));
    send(&mut session, "Who?");
    session.set_system(Some("Be brief."));
    let reply = session.send("Why?", &options(2), &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(reply.reread);
}

#[test]
fn files_that_are_no_session_of_the_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.still");
    let [student, sliding, teacher] = &models()[..] else { panic!() };
    let mut session = ChatSession::new(student.clone(), RowDtype::Bf16, None).unwrap();
    let empty = session.save(&path).unwrap_err().to_string();
    assert!(empty.contains("nothing was read yet"), "{empty}");
    send(&mut session, "Who?");
    session.save(&path).unwrap();
    assert!(ChatSession::is_saved_in(&path) && !ChatSession::is_saved_in(dir.path()));
    let told = |model: &Model, path: &Path| {
        let error = ChatSession::open(model.clone(), path).unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    };
    for other in [sliding, teacher] {
        let told = told(other, &path);
        assert!(told.contains("a session of another model"), "{told}");
    }
    // One that cannot be loaded leaves the conversation as it was.
    let other = dir.path().join("other.still");
    let mut another = ChatSession::new(teacher.clone(), RowDtype::Bf16, None).unwrap();
    send(&mut another, "Who?");
    another.save(&other).unwrap();
    let before = ask(&session, "Why?");
    assert!(session.load(&other).is_err());
    assert_eq!(ask(&session, "Why?"), before);

    // A tensor that is missing, or of another type.
    let tensors = || still_model::tensor_file::read_tensors(&path, true).unwrap();
    let bad = dir.path().join("bad.still");
    for (name, words) in [
        ("session", "not a session"),
        ("messages", "without \"messages\""),
        ("tokens", "without \"tokens\""),
        ("generated.text", "not both there"),
        ("layers.0.0.s", "bad.still"),
    ] {
        let mut without = tensors();
        assert!(without.remove(name).is_some(), "{name}");
        still_model::tensor_file::save_tensors(&bad, &without).unwrap();
        let told = told(student, &bad);
        assert!(told.contains(words), "{name}: {told}");
    }
    let mut wrong = tensors();
    let tokens = wrong["tokens"].to_dtype(candle_core::DType::U8).unwrap();
    wrong.insert("tokens".into(), tokens);
    still_model::tensor_file::save_tensors(&bad, &wrong).unwrap();
    assert!(told(student, &bad).contains("\"tokens\" is u8"));
    let mut shorter = tensors();
    let tokens = shorter["tokens"].narrow(0, 0, 3).unwrap();
    shorter.insert("tokens".into(), tokens);
    still_model::tensor_file::save_tensors(&bad, &shorter).unwrap();
    assert!(told(student, &bad).contains("it says 3"));
}
