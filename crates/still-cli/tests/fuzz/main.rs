//! Damaged and hostile files of every format, fed to the command: it must end with 0, or with 1, one `error:` and one `hint:`.
//!
//! ```text
//! cargo test --release -p still-cli --test fuzz                                    # what CI runs: a minute
//! cargo test --release -p still-cli --test fuzz -- --runs 20000 --seed 1           # long
//! cargo test --release -p still-cli --test fuzz -- --runs 1 --seed 1234            # one case again
//! cargo test --release -p still-cli --test fuzz -- --runs 5000 --target gguf       # one format
//! ```
//!
//! Case `n` of a run with `--seed s` is the only case of `--seed s+n --runs 1`. A case that fails is kept, with its command,
//! and the run goes on. Every case is a process of its own under limits on memory and time, so that an abort, a stack that
//! overflows or a loop without end is one failure like any other.

mod binary;
#[path = "../common/mod.rs"]
mod common;
mod corpus;
mod json;
mod mutate;
mod oracle;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use corpus::{Corpus, Target};

/// Cases of a plain `cargo test`, unless the time is up before.
const USUAL_RUNS: usize = 2000;
/// How long a plain `cargo test` may take.
const USUAL_TIME: Duration = Duration::from_secs(75);

struct Options {
    runs: usize,
    seed: u64,
    time: Option<Duration>,
    target: Option<String>,
}

impl Options {
    fn read() -> Self {
        let mut options = Self { runs: USUAL_RUNS, seed: 0, time: Some(USUAL_TIME), target: None };
        let mut words = std::env::args().skip(1);
        // What other words cargo passes to every test is none of ours.
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
            match word.as_str() {
                "--runs" => {
                    options.runs = value().parse().expect("--runs N");
                    options.time = None;
                }
                "--seed" => options.seed = value().parse().expect("--seed N"),
                "--target" => options.target = Some(value()),
                _ => {}
            }
        }
        options
    }
}

/// A case that did not end as it should.
struct Failure {
    seed: u64,
    target: &'static str,
    change: String,
    what: String,
    kept: PathBuf,
}

fn main() {
    // Asked for by tools that list tests.
    if std::env::args().any(|word| word == "--list") {
        return;
    }
    let options = Options::read();
    let corpus = Corpus::make();
    let targets: Vec<&Target> = corpus
        .targets
        .iter()
        .filter(|target| options.target.as_deref().is_none_or(|name| target.name.contains(name)))
        .collect();
    assert!(!targets.is_empty(), "no target of that name");
    for target in &targets {
        let outcome = oracle::run(corpus.dir(), target, &corpus.dir().join("as-it-is"), None);
        assert!(
            matches!(outcome, Ok(0)),
            "{}: the file as it is does not work: {outcome:?}",
            target.name
        );
    }

    let (started, next) = (Instant::now(), AtomicUsize::new(0));
    let failures = Mutex::new(Vec::new());
    let refused = AtomicUsize::new(0);
    let worker = |worker: usize| {
        let scratch = corpus.dir().join(format!("worker-{worker}"));
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let over = options.time.is_some_and(|time| started.elapsed() > time);
            if n >= options.runs || over {
                return n;
            }
            let seed = options.seed + n as u64;
            match case(&corpus, &targets, seed, &scratch) {
                Ok(code) => {
                    refused.fetch_add(code as usize, Ordering::Relaxed);
                }
                Err(failure) => {
                    eprintln!(
                        "seed {}: {}: {}: {}",
                        failure.seed, failure.target, failure.change, failure.what
                    );
                    failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    std::thread::scope(|scope| {
        for n in 0..threads {
            let worker = &worker;
            scope.spawn(move || worker(n));
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "fuzz: {} cases in {:.0} s, {} refused, {} failed",
        next.into_inner().min(options.runs),
        started.elapsed().as_secs_f64(),
        refused.into_inner(),
        failures.len()
    );
    for failure in &failures {
        println!(
            "seed {} ({}): {}\n  {}\n  kept in {}",
            failure.seed,
            failure.target,
            failure.change,
            failure.what,
            failure.kept.display()
        );
    }
    assert!(failures.is_empty(), "{} cases failed", failures.len());
}

/// One case: a copy of a target's files, one of them changed, and what the command makes of it.
fn case(corpus: &Corpus, targets: &[&Target], seed: u64, scratch: &Path) -> Result<i32, Failure> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let target = targets[rng.random_range(0..targets.len())];
    let file = &target.files[rng.random_range(0..target.files.len())];
    let original = std::fs::read(corpus.dir().join(target.from).join(file)).unwrap();
    let mut bytes = original.clone();
    let mut change = mutate::mutate(&mut bytes, file, &mut rng);
    // Now and then two things are wrong.
    if rng.random_ratio(1, 5) {
        change = format!("{change}; {}", mutate::mutate(&mut bytes, file, &mut rng));
    }
    let change = format!("{file}: {change}");
    oracle::run(corpus.dir(), target, scratch, Some((file, &bytes))).map_err(|what| {
        let kept = common::kept_dir(&format!("{}-{seed}", target.name));
        std::fs::write(kept.join(file.replace('/', "_")), &bytes).unwrap();
        std::fs::write(kept.join("command"), format!("{:?}\n{what}\n", target.command)).unwrap();
        Failure { seed, target: target.name, change, what, kept }
    })
}
