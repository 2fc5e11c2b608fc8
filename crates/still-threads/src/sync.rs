//! What threads meet by: the standard library's, or loom's model of it.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

/// Looks until `done`, for about as long as a piece of work takes; whether it came true.
#[cfg(not(loom))]
pub(crate) fn spin_until(mut done: impl FnMut() -> bool) -> bool {
    use std::time::{Duration, Instant};

    /// Longer than nearly all waits on a machine of one's own, short compared with a scheduler's time slice.
    const LONGEST: Duration = Duration::from_micros(100);
    /// Looks between two readings of the clock.
    const LOOKS: usize = 32;

    let mut started = None;
    loop {
        for _ in 0..LOOKS {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if started.get_or_insert_with(Instant::now).elapsed() > LONGEST {
            return false;
        }
    }
}

/// In a model of every order nothing is gained by looking twice.
#[cfg(loom)]
pub(crate) fn spin_until(mut done: impl FnMut() -> bool) -> bool {
    done()
}
