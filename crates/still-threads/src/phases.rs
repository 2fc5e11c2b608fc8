//! The phases, and who may work in which.

use std::ops::Range;

use crate::sync::{
    AtomicBool, AtomicU64, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, spin_until,
};

/// Phases in order, begun by whoever comes first and over when the last piece that was taken is done.
///
/// Every thread calls [`Phases::enter`] for phase 0, 1, 2 … with the same number of units for each.
#[derive(Debug)]
pub struct Phases {
    /// The current phase's number, from bit 32; whether threads sleep until it is over; whether it is closed to more
    /// of them; how many are in it.
    state: AtomicU64,
    /// Units of the current phase that somebody has taken, or more.
    taken: AtomicUsize,
    /// A thread has left in the middle: nobody shall wait for it.
    failed: AtomicBool,
    /// Held by those who go to sleep or wake others.
    sleep: Mutex<()>,
    over: Condvar,
}

const PHASE: u32 = 32;
const SLEEPERS: u64 = 1 << 31;
const CLOSED: u64 = 1 << 30;
const WORKERS: u64 = CLOSED - 1;

/// Another thread failed: the phases do not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another thread failed")
    }
}

impl std::error::Error for Failed {}

impl Default for Phases {
    fn default() -> Self {
        Self::new()
    }
}

impl Phases {
    /// Before the first phase.
    pub fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            taken: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            sleep: Mutex::new(()),
            over: Condvar::new(),
        }
    }

    /// Waits until phase `number` has begun. What is left of its `units` comes in pieces of `piece`; `None` if nothing is
    /// left, or the phase is over.
    ///
    /// What others wrote in earlier phases may be read until the last piece has been asked for ([`Work::next`]), and no
    /// longer: the phases after may write it again.
    ///
    /// # Errors
    /// If a thread has failed.
    pub fn enter(
        &self,
        number: u32,
        units: usize,
        piece: usize,
    ) -> Result<Option<Work<'_>>, Failed> {
        self.wait_for(number)?;
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let nothing_left = self.taken.load(Ordering::Relaxed) >= units;
            if phase(state) != number || state & CLOSED != 0 || (nothing_left && units > 0) {
                return Ok(None);
            }
            let entered = self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::Acquire,
                Ordering::Acquire,
            );
            match entered {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        Ok(Some(Work { phases: self, number, units, piece: piece.max(1), inside: true }))
    }

    /// Ends all waiting: the calling thread will not finish what it took.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        let _awake = self.lock();
        self.over.notify_all();
    }

    fn wait_for(&self, number: u32) -> Result<(), Failed> {
        let begun = || phase(self.state.load(Ordering::Acquire)) >= number;
        let failed = || self.failed.load(Ordering::Acquire);
        if !spin_until(|| begun() || failed()) {
            let mut awake = self.lock();
            // Whoever ends the phase after this sees that somebody sleeps, and cannot call before the lock is let go.
            while phase(self.state.fetch_or(SLEEPERS, Ordering::AcqRel)) < number && !failed() {
                awake = self.over.wait(awake).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        }
        if failed() { Err(Failed) } else { Ok(()) }
    }

    /// The calling thread has done what it took of a phase of which nothing is left.
    fn leave(&self, number: u32) {
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        if before & WORKERS != 1 {
            return;
        }
        // The last: it is closed, so that nobody comes between.
        self.taken.store(0, Ordering::Relaxed);
        // What all wrote in the phase is seen by who sees the next one begin.
        let before = self.state.swap(u64::from(number + 1) << PHASE, Ordering::AcqRel);
        if before & SLEEPERS != 0 {
            let _awake = self.lock();
            self.over.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.sleep.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn phase(state: u64) -> u32 {
    (state >> PHASE) as u32
}

/// A thread's part in a phase: ranges of units, until all are taken.
///
/// Dropped before that, as by an error, it leaves the phase open forever: call [`Phases::fail`] then.
#[derive(Debug)]
pub struct Work<'a> {
    phases: &'a Phases,
    number: u32,
    units: usize,
    piece: usize,
    inside: bool,
}

impl Iterator for Work<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        if !self.inside {
            return None;
        }
        let start = self.phases.taken.fetch_add(self.piece, Ordering::Relaxed);
        if start < self.units {
            return Some(start..(start + self.piece).min(self.units));
        }
        self.inside = false;
        self.phases.leave(self.number);
        None
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_thread_that_does_not_come_is_not_waited_for() {
        let phases = Phases::new();
        for number in 0..1000 {
            assert_eq!(phases.enter(number, 5, 2).unwrap().unwrap().count(), 3);
        }
        // It finds everything over, and goes on with what comes.
        for number in 0..1000 {
            assert!(phases.enter(number, 5, 2).unwrap().is_none());
        }
        assert_eq!(phases.enter(1000, 3, 1).unwrap().unwrap().count(), 3);
    }

    #[test]
    fn a_piece_at_work_is_waited_for_asleep() {
        let (phases, done) = (Phases::new(), AtomicU32::new(0));
        thread::scope(|scope| {
            let mut first = phases.enter(0, 1, 1).unwrap().unwrap();
            assert_eq!(first.next(), Some(0..1));
            let other = scope.spawn(|| {
                // Nothing is left of the first phase.
                assert!(phases.enter(0, 1, 1).unwrap().is_none());
                let second = phases.enter(1, 1, 1).unwrap().unwrap();
                assert_eq!(done.load(Ordering::Relaxed), 1);
                second.count()
            });
            thread::sleep(Duration::from_millis(20));
            assert_ne!(phases.state.load(Ordering::Relaxed) & SLEEPERS, 0, "it still spins");
            done.store(1, Ordering::Relaxed);
            assert_eq!(first.next(), None);
            assert_eq!(other.join().unwrap(), 1);
        });
    }

    #[test]
    fn a_phase_of_nothing_passes() {
        let phases = Phases::new();
        assert_eq!(phases.enter(0, 0, 4).unwrap().unwrap().count(), 0);
        assert_eq!(phases.enter(1, 1, 0).unwrap().unwrap().count(), 1);
    }

    #[test]
    fn sums_of_many_threads_are_whole_in_every_phase() {
        const UNITS: usize = 64;
        let phases = Phases::new();
        let cells: Vec<[AtomicU32; 2]> = (0..UNITS).map(|_| Default::default()).collect();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for number in 0..500_u32 {
                        let Some(work) = phases.enter(number, UNITS, 3).unwrap() else { continue };
                        let from = number as usize % 2;
                        // Relaxed: that phases follow each other orders them.
                        let whole = cells.iter().all(|c| c[from].load(Ordering::Relaxed) == number);
                        assert!(whole, "phase {number}");
                        for unit in work.flatten() {
                            cells[unit][1 - from].store(number + 1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(cells.iter().all(|c| c[0].load(Ordering::Relaxed) == 500));
    }
}
