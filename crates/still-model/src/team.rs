//! Threads that go through a decode step together.
//!
//! A step is a few hundred products of some ten microseconds each. Handing every one to a pool costs as much as the
//! products do: a thread that found no work is asleep when the next piece comes. Here all threads run the whole step, take
//! shares of each phase, and meet at its end by looking at one number.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{ModelError, Result};

/// Looks at the number before a waiting thread lets others run.
const SPINS: usize = 20_000;

/// Runs `body` on every thread of the pool at once.
///
/// Every member must go through the same phases, unless one fails: then all of them return.
///
/// # Errors
/// The first that a member returned.
pub(crate) fn together(body: impl Fn(&Member<'_>) -> Result<()> + Sync) -> Result<()> {
    let team = Team {
        size: rayon::current_num_threads(),
        arrived: AtomicUsize::new(0),
        phase: AtomicUsize::new(0),
        taken: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
    };
    rayon::broadcast(|thread| {
        // Also if the body panics.
        let fails = FailOnDrop(&team);
        match body(&Member { team: &team, index: thread.index() }) {
            Ok(()) => std::mem::forget(fails),
            Err(error) => {
                team.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    });
    team.error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

struct Team {
    size: usize,
    /// Members that have done this phase's work.
    arrived: AtomicUsize,
    phase: AtomicUsize,
    /// Units of this phase that somebody has taken.
    taken: AtomicUsize,
    /// A member has left: nobody shall wait for it.
    failed: AtomicBool,
    error: Mutex<Option<ModelError>>,
}

/// One thread of the team.
pub(crate) struct Member<'a> {
    team: &'a Team,
    /// Of the threads of the pool.
    pub index: usize,
}

impl Member<'_> {
    /// Does shares of `units` units, about `shares` for each member, until all are taken; returns when all are done.
    ///
    /// # Errors
    /// Of `share`; or if another member failed.
    pub fn phase(
        &self,
        units: usize,
        shares: usize,
        mut share: impl FnMut(Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let team = self.team;
        let size = (units / (team.size * shares)).max(1);
        loop {
            let start = team.taken.fetch_add(size, Ordering::Relaxed);
            if start >= units {
                return self.meet();
            }
            share(start..(start + size).min(units))?;
        }
    }

    fn meet(&self) -> Result<()> {
        let team = self.team;
        let phase = team.phase.load(Ordering::Relaxed);
        if team.arrived.fetch_add(1, Ordering::AcqRel) + 1 == team.size {
            team.arrived.store(0, Ordering::Relaxed);
            team.taken.store(0, Ordering::Relaxed);
            // What every member wrote in the phase is seen by who sees the next one begin.
            team.phase.store(phase + 1, Ordering::Release);
            return Ok(());
        }
        let mut looks = 0;
        while team.phase.load(Ordering::Acquire) == phase {
            if team.failed.load(Ordering::Acquire) {
                return Err(ModelError::Invalid("another thread of the step failed".into()));
            }
            looks += 1;
            if looks < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

struct FailOnDrop<'a>(&'a Team);

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        self.0.failed.store(true, Ordering::Release);
    }
}

/// Values that members write disjoint parts of in one phase and read in another.
pub(crate) struct Shared<'a> {
    values: &'a [UnsafeCell<f32>],
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: access is by the contracts of `read` and `write`.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(values: &'a mut [f32]) -> Self {
        let (start, length) = (values.as_mut_ptr().cast::<UnsafeCell<f32>>(), values.len());
        // SAFETY: `UnsafeCell<f32>` is laid out as `f32`, and the values are borrowed mutably for `'a`.
        let values = unsafe { std::slice::from_raw_parts(start, length) };
        Self { values, borrow: PhantomData }
    }

    /// All values.
    ///
    /// # Safety
    /// No member writes any of them in this phase.
    pub unsafe fn read(&self) -> &[f32] {
        // SAFETY: by this function's own contract nothing changes while the slice lives.
        unsafe { std::slice::from_raw_parts(self.values.as_ptr().cast(), self.values.len()) }
    }

    /// Part of the values, to write.
    ///
    /// # Safety
    /// Nobody else reads or writes this part in this phase.
    #[allow(clippy::mut_from_ref, reason = "the cells are this type's purpose")]
    pub unsafe fn write(&self, part: Range<usize>) -> &mut [f32] {
        let cells = &self.values[part];
        // SAFETY: the cells allow mutation, and by this function's own contract the part is this caller's.
        unsafe { std::slice::from_raw_parts_mut(cells.as_ptr() as *mut f32, cells.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(threads: usize, body: impl FnOnce() + Send) {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body);
    }

    #[test]
    fn every_unit_is_done_once_in_every_phase() {
        for threads in [1, 2, 5] {
            on(threads, || {
                let mut values = vec![0.0; 1000];
                let shared = Shared::new(&mut values);
                together(|member| {
                    for phase in 0..300 {
                        let units = [1, 7, 1000][phase % 3];
                        member.phase(units, 4, |part| {
                            // SAFETY: shares are disjoint.
                            unsafe { shared.write(part) }.iter_mut().for_each(|x| *x += 1.0);
                            Ok(())
                        })?;
                    }
                    Ok(())
                })
                .unwrap();
                assert_eq!((values[0], values[6], values[7]), (300.0, 200.0, 100.0));
                assert!(values[7..].iter().all(|&x| x == 100.0));
            });
        }
    }

    #[test]
    fn an_error_ends_the_step_for_all() {
        on(3, || {
            let error = together(|member| {
                for phase in 0..10 {
                    member.phase(3, 1, |unit| match (phase, unit.start) {
                        (4, 1) => Err(ModelError::Invalid("enough".into())),
                        (5.., _) => panic!("a phase went on without a member"),
                        _ => Ok(()),
                    })?;
                }
                Ok(())
            });
            assert_eq!(error.unwrap_err().to_string(), "enough");
        });
    }
}
