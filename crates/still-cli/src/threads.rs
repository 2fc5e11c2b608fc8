//! The number of compute threads.

use std::env;

use crate::errors::user;

/// More than any machine that this runs on has cores.
const MOST: usize = 1024;
/// What the libraries go by; `--threads` comes before it.
const VARIABLE: &str = "RAYON_NUM_THREADS";

/// Settles the number of threads for the whole process: `--threads`, else `RAYON_NUM_THREADS`, else as many as the system
/// grants (cores, less what an affinity mask or a cgroup's quota takes).
///
/// Must come before anything computes, and before there are other threads.
///
/// # Errors
/// A number out of range; a system that gives no threads.
pub fn settle(asked: Option<usize>) -> anyhow::Result<()> {
    let threads = match asked {
        Some(threads) => in_range("--threads", threads)?,
        None => match of_environment()? {
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, usize::from).min(MOST),
        },
    };
    // SAFETY: nothing else runs yet (see above).
    // The tensor library makes threads of its own, as many as this says.
    unsafe { env::set_var(VARIABLE, threads.to_string()) };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|error| {
        user(
            format!("cannot start {threads} threads: {error}"),
            "use fewer (--threads), or raise the limit on processes (ulimit -u)",
        )
    })
}

fn of_environment() -> anyhow::Result<Option<usize>> {
    let Some(value) = env::var_os(VARIABLE) else { return Ok(None) };
    let value = value.to_string_lossy();
    match value.trim() {
        // rayon's own word for "as usual".
        "" | "0" => Ok(None),
        number => match number.parse() {
            Ok(threads) => in_range(VARIABLE, threads).map(Some),
            Err(_) => Err(out_of_range(VARIABLE, number)),
        },
    }
}

fn in_range(name: &str, threads: usize) -> anyhow::Result<usize> {
    match threads {
        1..=MOST => Ok(threads),
        _ => Err(out_of_range(name, &threads.to_string())),
    }
}

fn out_of_range(name: &str, value: &str) -> anyhow::Error {
    user(
        format!("{name} {value} is out of range"),
        format!("use a number from 1 to {MOST}, or leave it out for all cores"),
    )
}
