//! States in a store: after a restart, and shared by two engines.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::memory::InMemory;
use object_store::throttle::{ThrottleConfig, ThrottledStore};
use still_serve::{Engine, EngineOptions, StateStore};

use crate::common::{
    LARGEST_BF16, engine, forged, options, prompt, request, serve, served, student,
};

fn start(seed: u64, store: &StateStore) -> Engine {
    let options = EngineOptions { state_store: Some(store.clone()), ..options() };
    Engine::start(student(seed), options).unwrap()
}

fn folder(dir: &Path) -> StateStore {
    StateStore::open(dir.to_str().unwrap()).unwrap()
}

/// All files below.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn a_conversation_goes_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = {
        let engine = start(1, &folder(dir.path()));
        let first = serve(&engine, prompt(1, 1000), 30);
        engine.shutdown(Duration::from_secs(60));
        first
    };
    let second = [prompt(1, 1000), first.ids.clone(), prompt(2, 50)].concat();
    let again = start(1, &folder(dir.path()));
    let got = serve(&again, second.clone(), 20);
    assert_eq!((got.cached, again.counters().tokens_read), (1029, 51));
    // As the engine that goes on does.
    let engine = engine();
    assert_eq!(serve(&engine, prompt(1, 1000), 30).ids, first.ids);
    assert_eq!(serve(&engine, second, 20).ids, got.ids);
}

#[test]
fn two_engines_that_share_a_store_read_nothing_again() {
    let store = StateStore::new(Arc::new(InMemory::new()), "replicas");
    let replicas = [start(1, &store), start(1, &store)];
    let single = engine();
    let (mut tokens, mut read) = (prompt(1, 700), 700);
    for turn in 0..6 {
        let got = serve(&replicas[turn % 2], tokens.clone(), 25);
        assert_eq!(got.ids, serve(&single, tokens.clone(), 25).ids, "turn {turn}");
        assert_eq!(got.cached, tokens.len() - read, "turn {turn}");
        tokens = [tokens, got.ids, prompt(70 + turn as u64, 40)].concat();
        // What is new, and the token that no step was fed.
        read = 41;
    }
    let total: u64 = replicas.iter().map(|replica| replica.counters().tokens_read).sum();
    assert_eq!(total, single.counters().tokens_read);
}

#[test]
fn a_state_of_another_model_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = folder(dir.path());
    serve(&start(1, &store), prompt(1, 500), 5);
    let other = start(2, &store);
    let got = serve(&other, prompt(1, 500), 5);
    assert_eq!(got.cached, 0);
    let mut named = request(prompt(1, 100), 0);
    named.save_as = Some("mine".into());
    served(other.submit(named).unwrap());
    let mut continued = request(prompt(2, 5), 1);
    continued.continues = Some("mine".into());
    assert!(crate::common::end(start(1, &store).submit(continued).unwrap()).is_err());
}

/// Cut short at any length, changed in any place, of another model under this one's name, or of other tokens: the prompt is read as
/// if there were none.
#[test]
fn damaged_and_forged_files_are_read_over() {
    let dir = tempfile::tempdir().unwrap();
    let store = folder(dir.path());
    let (asked, expected) = {
        let engine = start(1, &store);
        let first = serve(&engine, prompt(1, 500), 5);
        let asked = [prompt(1, 500), first.ids, prompt(2, 9)].concat();
        let expected = serve(&self::engine(), asked.clone(), 5).ids;
        engine.shutdown(Duration::from_secs(60));
        (asked, expected)
    };
    let good: Vec<(PathBuf, Vec<u8>)> = files(dir.path())
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    assert_eq!(good.len(), 2);
    let foreign = {
        let other = tempfile::tempdir().unwrap();
        let engine = start(2, &folder(other.path()));
        serve(&engine, prompt(1, 500), 5);
        engine.shutdown(Duration::from_secs(60));
        std::fs::read(&files(other.path())[0]).unwrap()
    };
    let swapped = |n: usize| good[1 - n].1.clone();
    type Change<'a> = (&'a str, Box<dyn Fn(usize, &[u8]) -> Vec<u8> + 'a>);
    let changes: Vec<Change<'_>> = vec![
        ("empty", Box::new(|_, _| Vec::new())),
        ("cut", Box::new(|_, bytes| bytes[..bytes.len() / 2].to_vec())),
        ("short", Box::new(|_, bytes| bytes[..5].to_vec())),
        (
            "flipped",
            Box::new(|_, bytes| {
                let mut bytes = bytes.to_vec();
                let at = bytes.len() * 3 / 4;
                bytes[at] ^= 4;
                bytes
            }),
        ),
        ("a huge header", Box::new(|_, bytes| [&u64::MAX.to_le_bytes(), &bytes[8..]].concat())),
        ("another model's", Box::new(|_, _| foreign.clone())),
        ("of other tokens", Box::new(|n, _| swapped(n))),
    ];
    for (what, change) in changes {
        for (n, (path, bytes)) in good.iter().enumerate() {
            std::fs::write(path, change(n, bytes)).unwrap();
        }
        let engine = start(1, &store);
        let got = serve(&engine, asked.clone(), 5);
        assert_eq!((got.cached, got.ids.len()), (0, 5), "{what}");
        assert_eq!(got.ids.len(), expected.len());
        engine.shutdown(Duration::from_secs(60));
        for path in files(dir.path()) {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// A file that is whole, of this model and of these tokens, whose values are finite and lead to none: the prompt is read without it,
/// by all that would have gone on from it, and a good file takes its place.
#[test]
fn a_kept_state_that_leads_to_no_numbers_is_read_over() {
    let dir = tempfile::tempdir().unwrap();
    let store = folder(dir.path());
    let engine = start(1, &store);
    serve(&engine, prompt(1, 500), 5);
    engine.shutdown(Duration::from_secs(60));
    let good: Vec<_> =
        files(dir.path()).into_iter().map(|f| (f.clone(), std::fs::read(f).unwrap())).collect();
    for (path, bytes) in &good {
        std::fs::write(path, forged(bytes, "layers.1.0.ring_v", &LARGEST_BF16)).unwrap();
    }
    let engine = start(1, &store);
    let asked = || request([prompt(1, 500), prompt(2, 1200)].concat(), 20);
    let both = [asked(), asked()].map(|asked| engine.submit(asked).unwrap());
    let alone = serve(&self::engine(), asked().prompt, 20);
    for events in both {
        assert_eq!(served(events).ids, alone.ids);
    }
    let again = served(engine.submit(asked()).unwrap());
    assert_eq!((again.ids, again.usage.cached_tokens), (alone.ids.clone(), 1664));
    // The prompt of before ends where a file is that was found out.
    assert_eq!(
        serve(&engine, prompt(1, 500), 20).ids,
        serve(&self::engine(), prompt(1, 500), 20).ids
    );
    engine.shutdown(Duration::from_secs(60));
    let restarted = start(1, &store);
    let got = serve(&restarted, asked().prompt, 20);
    assert_eq!((got.ids, got.cached), (alone.ids, 1664));
    assert_eq!(serve(&restarted, prompt(1, 500), 20).cached, 448);
}

/// What a process left that was killed before it renamed its file is no state, and takes no state away.
#[test]
fn a_write_that_was_cut_off_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = folder(dir.path());
    let engine = start(1, &store);
    serve(&engine, prompt(1, 500), 5);
    engine.shutdown(Duration::from_secs(60));
    for path in files(dir.path()) {
        let mut name = path.file_name().unwrap().to_owned();
        name.push("#1");
        std::fs::write(path.with_file_name(name), "half").unwrap();
    }
    let again = start(1, &store);
    assert_eq!(serve(&again, prompt(1, 500), 5).cached, 448);
    let mut save = request(prompt(1, 70), 0);
    save.save_as = Some("n".into());
    served(again.submit(save).unwrap());
}

/// Requests do not wait, one after the other, for a store that does not answer; they are served, and no state is written.
#[test]
fn a_store_that_does_not_answer_is_left_alone() {
    let hour = Duration::from_secs(3600);
    let slow = ThrottleConfig {
        wait_list_with_delimiter_per_call: hour,
        wait_get_per_call: hour,
        ..ThrottleConfig::default()
    };
    let store = Arc::new(ThrottledStore::new(InMemory::new(), slow));
    let options = EngineOptions {
        state_store: Some(StateStore::new(store, "slow")),
        state_store_patience: Duration::from_millis(100),
        ..options()
    };
    let engine = Engine::start(student(1), options).unwrap();
    let begun = Instant::now();
    for n in 0..50 {
        let got = serve(&engine, prompt(n, 200), 3);
        assert_eq!(got.ids.len(), 3);
    }
    // Not 50 times the time that it is given; slow machines have a long time to compute.
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
}

#[test]
fn a_store_stays_within_its_bound() {
    let dir = tempfile::tempdir().unwrap();
    let one = {
        let engine = start(1, &folder(dir.path()));
        serve(&engine, prompt(1, 100), 1);
        engine.shutdown(Duration::from_secs(60));
        files(dir.path()).iter().map(|path| path.metadata().unwrap().len()).max().unwrap()
    };
    let options = EngineOptions {
        state_store: Some(folder(dir.path())),
        state_store_bytes: 4 * one,
        ..options()
    };
    let engine = Engine::start(student(1), options).unwrap();
    for n in 2..12 {
        serve(&engine, prompt(n, 100), 1);
    }
    engine.shutdown(Duration::from_secs(60));
    let left = files(dir.path());
    let bytes: u64 = left.iter().map(|path| path.metadata().unwrap().len()).sum();
    // Also of writes that meet.
    assert!(bytes <= 4 * one && !left.is_empty(), "{bytes} of {one} each");
}

#[test]
fn a_location_that_is_no_store_is_refused() {
    let error = StateStore::open("gs://bucket/x").unwrap_err();
    assert!(error.to_string().contains("\"gs\"") && error.hint().is_some(), "{error}");
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = file.path().join("x");
    assert!(StateStore::open(below.to_str().unwrap()).is_err());
}
