//! Changed files of states in an engine's store: cut short, forged with a right digest, of another model. Each is refused or continued,
//! never with a panic, and the engine goes on. The last file lies in `fuzz_states.last` of cargo's temporary directory.
//!
//! ```text
//! cargo test --release -p still-serve --test fuzz_states                           # what CI runs: some seconds
//! cargo test --release -p still-serve --test fuzz_states -- --minutes 10 --seed 1  # long
//! ```

#[path = "../../../still-cli/tests/fuzz/binary.rs"]
#[allow(dead_code, reason = "other formats are not changed here")]
mod binary;
#[path = "../it/common.rs"]
#[allow(dead_code, reason = "each test executable uses a part")]
mod common;
#[path = "../../../still-cli/tests/fuzz/json.rs"]
mod json;
mod options;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_model::seal::{Kind, seal_bytes};
use still_serve::{Engine, EngineOptions, Failure, StateError, StateStore};

use common::{end, prompt, request, serve, served, student};

/// How long a plain `cargo test` takes.
const USUAL_TIME: Duration = Duration::from_secs(8);

/// The longest that anything may take that is done with a file.
const PATIENCE: Duration = Duration::from_secs(60);

/// The state that is changed.
const NAME: &str = "name";

fn start(seed: u64, dir: &Path) -> Engine {
    let store = StateStore::open(dir.to_str().unwrap()).unwrap();
    let options = EngineOptions {
        state_store: Some(store),
        request_timeout: Some(PATIENCE),
        ..common::options()
    };
    Engine::start(student(seed), options).unwrap()
}

/// The files below a folder.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// What an engine has saved: a state with a name after so many tokens, and where that lies.
fn saved(engine: &Engine, dir: &Path, tokens: usize, new: usize) -> (PathBuf, Vec<u8>) {
    let mut save = request(prompt(1, tokens), new);
    save.save_as = Some(NAME.into());
    served(engine.submit(save).unwrap());
    let path = files(dir).into_iter().find(|path| path.file_stem().is_some_and(|s| s == NAME));
    let path = path.unwrap();
    (path.clone(), std::fs::read(path).unwrap())
}

/// What a call on states gives. The engine's own threads do the work.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let (mut future, begun) = (std::pin::pin!(future), Instant::now());
    loop {
        if let Some(done) = future.as_mut().now_or_never() {
            return done;
        }
        assert!(begun.elapsed() < PATIENCE, "a call on states does not end");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn change(bytes: &mut Vec<u8>, others: &[Vec<u8>], rng: &mut ChaCha8Rng) -> String {
    match rng.random_range(0..12) {
        0 => {
            bytes.truncate(rng.random_range(0..bytes.len()));
            format!("cut to {}", bytes.len())
        }
        1 => {
            let more = rng.random_range(1..5000);
            bytes.extend((0..more).map(|_| rng.random::<u8>()));
            format!("{more} more bytes")
        }
        2 => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
            format!("byte {at}")
        }
        3 => {
            // The end of another state's file.
            let other = others.choose(rng).unwrap();
            let at = rng.random_range(0..bytes.len().min(other.len()));
            bytes.truncate(at);
            bytes.extend(&other[at..]);
            format!("another's from {at} on")
        }
        4 => {
            *bytes = others.choose(rng).unwrap().clone();
            "another's".into()
        }
        5 => {
            // A piece elsewhere.
            let length = rng.random_range(1..bytes.len() / 2);
            let (from, to) = (rng.random_range(0..length), rng.random_range(0..length));
            bytes.copy_within(from..from + length, to);
            format!("{length} bytes of {from} at {to}")
        }
        6 => {
            // Texts and numbers at the beginning of the tensors.
            let start = bytes.len() / 8;
            let at = rng.random_range(start..bytes.len() - 8);
            let value = *binary::EXTREME.choose(rng).unwrap();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            format!("{value} at {at}")
        }
        _ => binary::safetensors(bytes, rng).unwrap_or_else(|| "nothing".into()),
    }
}

/// How it ended that a request continued a state or a call asked for it.
fn ending(error: &StateError) -> &'static str {
    match error {
        StateError::Failed(what) => panic!("{what}"),
        StateError::Slow(_) => panic!("{error}"),
        StateError::File(_) => "refused",
        StateError::Forged(_) => "forged",
        StateError::NoNumbers(_) => "no numbers",
        _ => "other",
    }
}

fn main() {
    if std::env::args().any(|word| word == "--list") {
        return;
    }
    let (time, seed) = options::options(USUAL_TIME);
    let dir = tempfile::tempdir().unwrap();
    let engine = start(1, dir.path());
    // Within a chunk and beyond, of tokens that were read and of some that were chosen.
    let lengths = [(1, 0), (7, 0), (40, 3), (100, 0), (150, 9)];
    let good: Vec<_> = lengths.map(|(n, new)| saved(&engine, dir.path(), n, new)).into();
    let path = good[0].0.clone();
    let good: Vec<Vec<u8>> = good.into_iter().map(|(_, bytes)| bytes).collect();
    let foreign = tempfile::tempdir().unwrap();
    let foreign = saved(&start(2, foreign.path()), foreign.path(), 100, 0).1;
    let others = [good.as_slice(), &[foreign]].concat();
    let last = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz_states.last");
    let (begun, mut endings, mut cases) = (Instant::now(), BTreeMap::new(), 0);
    while begun.elapsed() < time {
        let mut rng = ChaCha8Rng::seed_from_u64(seed + cases);
        let mut bytes = good.choose(&mut rng).unwrap().clone();
        let mut done = Vec::new();
        for _ in 0..1 + usize::from(rng.random_ratio(1, 4)) {
            if !bytes.is_empty() {
                done.push(change(&mut bytes, &others, &mut rng));
            }
        }
        // A digest that fits lets it come further.
        if rng.random_ratio(3, 4) {
            let _ = seal_bytes(&mut bytes, Kind::Safetensors);
        }
        // Memory that runs out ends this process too.
        std::fs::write(&last, &bytes).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let case = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut ends = Vec::new();
            let states = engine.states();
            ends.push(wait(states.get(NAME)).map_or_else(|e| ending(&e), |_| "described"));
            ends.push(wait(states.list()).map_or_else(|e| ending(&e), |_| "listed"));
            ends.push(wait(states.restore(NAME)).map_or_else(|e| ending(&e), |_| "restored"));
            let mut next = request(prompt(2, 5), 3);
            next.continues = Some(NAME.into());
            next.save_as = Some("next".into());
            ends.push(match end(engine.submit(next).unwrap()) {
                Ok(_) => "continued",
                Err(Failure::State(error)) => ending(&error),
                Err(Failure::TooLong(_)) => "too long",
                Err(failure) => panic!("{failure}"),
            });
            ends
        }));
        let Ok(ends) = case else { panic!("case {cases} of seed {seed}: {}", done.join(", ")) };
        for end in ends {
            *endings.entry(end).or_insert(0_u64) += 1;
        }
        cases += 1;
    }
    // It serves as before.
    let fresh = tempfile::tempdir().unwrap();
    let expected = serve(&start(1, fresh.path()), prompt(3, 90), 5).ids;
    assert_eq!(serve(&engine, prompt(3, 90), 5).ids, expected);
    println!("fuzz_states: {cases} files in {:.0} s: {endings:?}", begun.elapsed().as_secs_f64());
    for must in ["refused", "continued"] {
        assert!(endings.contains_key(must), "no file was {must}");
    }
}
