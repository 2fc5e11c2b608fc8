//! The bar that the terminal shows, and lines that are printed meanwhile.
//!
//! The terminal shows one bar, the last that began; the one before comes back when that is over. A process has one terminal, hence
//! one list of bars.

use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget};

use super::narrow;

/// Those that began and are not over.
static BARS: Mutex<Vec<(u64, ProgressBar)>> = Mutex::new(Vec::new());

fn bars() -> MutexGuard<'static, Vec<(u64, ProgressBar)>> {
    BARS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows a bar until [`remove`] is told its number.
pub fn show(bar: &ProgressBar, wipe: impl FnOnce()) -> u64 {
    let mut bars = bars();
    if let Some((_, before)) = bars.last() {
        before.set_draw_target(ProgressDrawTarget::hidden());
        wipe();
    }
    let number = bars.last().map_or(0, |(number, _)| number + 1);
    bars.push((number, bar.clone()));
    bar.set_draw_target(narrow::target());
    number
}

/// Wipes a bar, and shows the one before it again.
pub fn remove(number: u64) {
    let mut bars = bars();
    let Some(place) = bars.iter().position(|&(known, _)| known == number) else { return };
    let was_shown = place + 1 == bars.len();
    let (_, bar) = bars.remove(place);
    bar.finish_and_clear();
    if was_shown && let Some((_, before)) = bars.last() {
        before.set_draw_target(narrow::target());
    }
}

/// Wipes every bar for good: the process ends.
pub fn close(wipe: impl FnOnce()) {
    let all = std::mem::take(&mut *bars());
    let Some((_, shown)) = all.last() else { return };
    shown.set_draw_target(ProgressDrawTarget::hidden());
    wipe();
    // A bar that is dropped waits for the thread that draws it.
    std::mem::forget(all);
}

/// Writes while no bar is on the terminal.
pub fn suspend<T>(write: impl FnOnce() -> T) -> T {
    let shown = bars().last().map(|(_, bar)| bar.clone());
    match shown {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}
