//! What a fuzz target is told.

use std::time::Duration;

/// How long to go on, and the first case's seed: `--minutes N --seed N`.
pub fn options(usual: Duration) -> (Duration, u64) {
    let (mut time, mut seed) = (usual, 0);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--minutes" => {
                time = Duration::from_secs_f64(60.0 * value().parse::<f64>().expect("--minutes N"))
            }
            "--seed" => seed = value().parse().expect("--seed N"),
            _ => {}
        }
    }
    (time, seed)
}
