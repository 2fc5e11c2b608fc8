//! States with names.

use futures_util::FutureExt;
use still_serve::{Engine, EngineOptions, Failure, StateError, StateList, StateStore, States};

use crate::common::{
    self, LARGEST_BF16, end, engine, options, prompt, request, serve, served, student,
};

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
    wait(states.list()).unwrap().states.into_iter().map(|state| state.name).collect()
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

/// An engine that keeps states in a folder, a state "good" and where its file lies.
fn with_a_state(dir: &std::path::Path) -> (Engine, std::path::PathBuf) {
    let store = StateStore::open(dir.to_str().unwrap()).unwrap();
    let options = EngineOptions { state_store: Some(store), ..options() };
    let engine = Engine::start(student(1), options).unwrap();
    let mut save = request(prompt(1, 300), 0);
    save.save_as = Some("good".into());
    served(engine.submit(save).unwrap());
    let of_model = dir.read_dir().unwrap().next().unwrap().unwrap().path();
    (engine, of_model.join("named/good.safetensors"))
}

/// How it ends that the state "forged" is asked for, and continued.
fn asked_for(engine: &Engine) -> [Result<(), StateError>; 2] {
    let mut continued = request(prompt(2, 5), 3);
    continued.continues = Some("forged".into());
    let continued = match end(engine.submit(continued).unwrap()) {
        Ok(_) => Ok(()),
        Err(Failure::State(error)) => Err(error),
        Err(failure) => panic!("{failure}"),
    };
    [wait(engine.states().restore("forged")).map(|_| ()), continued]
}

#[test]
fn files_that_are_no_states_are_named_and_hide_none() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, good) = with_a_state(dir.path());
    let bytes = std::fs::read(&good).unwrap();
    let header = |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let forged = [
        ("empty", Vec::new()),
        ("short", bytes[..7].to_vec()),
        ("cut", bytes[..100].to_vec()),
        ("huge", [&u64::MAX.to_le_bytes(), &bytes[8..]].concat()),
        ("text", b"this is no state, though it has more than eight bytes".to_vec()),
        ("other", header("{}")),
        ("negative", header(r#"{"tokens":{"dtype":"U32","shape":[-1],"data_offsets":[0,0]}}"#)),
        ("nothing", header("[]")),
    ];
    for (name, bytes) in &forged {
        std::fs::write(good.with_file_name(format!("{name}.safetensors")), bytes).unwrap();
    }
    let StateList { states, damaged } = wait(engine.states().list()).unwrap();
    let names: Vec<_> = states.iter().map(|state| (state.name.as_str(), state.tokens)).collect();
    assert_eq!(names, [("good", 300)]);
    let mut expected = forged.each_ref().map(|(name, _)| *name);
    expected.sort_unstable();
    assert_eq!(damaged, expected);
    for (name, _) in forged {
        let error = wait(engine.states().get(name)).unwrap_err();
        assert!(matches!(error, StateError::Forged(_)), "{name}: {error}");
        wait(engine.states().delete(name)).unwrap();
    }
    assert_eq!(wait(engine.states().list()).unwrap().damaged, Vec::<String>::new());
}

/// Of whichever tensor: the file is damaged, not the model.
#[test]
fn a_state_of_no_numbers_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, good) = with_a_state(dir.path());
    let forged = good.with_file_name("forged.safetensors");
    let bytes = std::fs::read(&good).unwrap();
    let forge = |name: &str, value: &[u8]| {
        std::fs::write(&forged, common::forged(&bytes, name, value)).unwrap();
    };
    let (nan, infinity) = (f32::NAN.to_le_bytes(), f32::INFINITY.to_le_bytes());
    let upper = |value: [u8; 4]| [value[2], value[3]];
    let mut changed = 0;
    for (name, tensor) in common::header(&bytes).as_object().unwrap() {
        let values: [Vec<u8>; 2] = match tensor["dtype"].as_str() {
            _ if !name.starts_with("layers.1.0.") || name.ends_with("score") => continue,
            Some("F32") => [nan.to_vec(), infinity.to_vec()],
            Some("BF16") => [upper(nan).to_vec(), upper(infinity).to_vec()],
            _ => continue,
        };
        for value in values {
            forge(name, &value);
            for ended in asked_for(&engine) {
                let error = ended.expect_err(name);
                assert!(matches!(error, StateError::File(_)), "{name}: {error}");
                assert!(error.to_string().contains("no numbers"), "{name}: {error}");
            }
        }
        changed += 1;
    }
    assert!(changed >= 6, "{changed} tensors");
    // Numbers that lead to none.
    forge("layers.1.0.ring_v", &LARGEST_BF16);
    let [asked, continued] = asked_for(&engine);
    asked.unwrap();
    assert!(matches!(continued, Err(StateError::NoNumbers(name)) if name == "forged"));
    // The engine serves as before.
    assert_eq!(serve(&engine, prompt(3, 90), 5).ids, serve(&self::engine(), prompt(3, 90), 5).ids);
}
