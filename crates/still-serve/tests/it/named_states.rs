//! States with names.

use futures_util::FutureExt;
use still_serve::{Engine, EngineOptions, Failure, StateError, States};

use crate::common::{end, engine, options, prompt, request, serve, served, student};

/// What a call on states gives. The engine's own threads do the work.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let Some(done) = future.as_mut().now_or_never() {
            return done;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn names(states: &States) -> Vec<String> {
    wait(states.list()).unwrap().into_iter().map(|state| state.name).collect()
}

#[test]
fn a_state_is_saved_continued_forked_and_removed() {
    let engine = engine();
    let states = engine.states();
    assert_eq!(names(&states), Vec::<String>::new());
    let mut save = request(prompt(1, 300), 0);
    save.save_as = Some("essay".into());
    assert_eq!(served(engine.submit(save).unwrap()).ids, Vec::<u32>::new());
    let info = wait(states.get("essay")).unwrap();
    assert_eq!((info.name.as_str(), info.tokens), ("essay", 300));
    assert!(info.bytes > 1000 && info.modified_unix_seconds > 1_700_000_000);
    assert_eq!(wait(states.restore("essay")).unwrap(), info);
    let copy = wait(states.fork("essay", "copy")).unwrap();
    assert_eq!((copy.tokens, copy.bytes), (300, info.bytes));
    assert_eq!(names(&states), ["copy", "essay"]);

    let mut continued = request(prompt(2, 20), 10);
    continued.continues = Some("copy".into());
    continued.save_as = Some("copy".into());
    let got = served(engine.submit(continued).unwrap());
    assert_eq!((got.cached, got.usage.prompt_tokens), (300, 320));
    let whole = serve(&crate::common::engine(), [prompt(1, 300), prompt(2, 20)].concat(), 10);
    assert_eq!(got.ids, whole.ids);
    assert_eq!(wait(states.get("copy")).unwrap().tokens, 329);
    assert_eq!(wait(states.get("essay")).unwrap().tokens, 300);

    wait(states.delete("essay")).unwrap();
    assert_eq!(names(&states), ["copy"]);
    for gone in [
        wait(states.get("essay")).map(|_| ()),
        wait(states.delete("essay")),
        wait(states.restore("essay")).map(|_| ()),
        wait(states.fork("essay", "x")).map(|_| ()),
    ] {
        assert!(matches!(gone, Err(StateError::NotFound(name)) if name == "essay"));
    }
    let mut gone = request(prompt(2, 20), 10);
    gone.continues = Some("essay".into());
    let failure = end(engine.submit(gone).unwrap()).unwrap_err();
    assert!(matches!(failure, Failure::State(StateError::NotFound(_))), "{failure}");
}

#[test]
fn a_name_is_no_path() {
    let engine = engine();
    let states = engine.states();
    for name in
        ["", ".", "..", "../x", "a/b", "a\\b", "é", ".hidden", "a b", "a%2f", &"x".repeat(129)]
    {
        let error = wait(states.get(name)).unwrap_err();
        assert!(matches!(error, StateError::InvalidName), "{name:?}: {error}");
        assert!(wait(states.fork("a", name)).is_err());
    }
}

#[test]
fn states_with_names_are_bounded_where_there_is_no_store() {
    let engine =
        Engine::start(student(1), EngineOptions { state_memory: 100, ..options() }).unwrap();
    let mut save = request(prompt(1, 300), 0);
    save.save_as = Some("essay".into());
    let failure = end(engine.submit(save).unwrap()).unwrap_err();
    assert!(matches!(failure, Failure::State(StateError::Full { most: 100 })), "{failure}");
    assert!(failure.hint().unwrap().contains("state store"));
}

#[test]
fn a_state_and_a_prompt_longer_than_the_context_are_refused() {
    let engine =
        Engine::start(student(1), EngineOptions { context: Some(320), ..options() }).unwrap();
    let mut save = request(prompt(1, 300), 0);
    save.save_as = Some("essay".into());
    served(engine.submit(save).unwrap());
    let mut continued = request(prompt(2, 20), 10);
    continued.continues = Some("essay".into());
    let failure = end(engine.submit(continued).unwrap()).unwrap_err();
    assert!(matches!(&failure, Failure::TooLong(_)), "{failure}");
}
