//! Run work on all threads together, phase by phase.
//!
//! To hand each product of a decode step to a pool costs as much as the product, because an idle thread is asleep when the next
//! product comes. Here all threads run the whole step and take pieces of each phase ([`still_threads`]).

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

pub use still_threads::Failed;
use still_threads::{Phases, Work};

/// Runs `body` on every thread of the pool at once.
///
/// Every thread must go through the same phases, unless one fails: then all of them return.
///
/// # Errors
/// The first error that a thread returned.
pub fn on_all_threads<E: Send>(
    body: impl Fn(&Worker<'_>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (phases, error) = (Phases::new(), Mutex::new(None));
    let size = rayon::current_num_threads();
    let fail = |reason| {
        error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
    };
    rayon::broadcast(|thread| {
        // Also if the body panics.
        let fails = FailOnDrop(&phases);
        let worker = Worker { phases: &phases, size, next: Cell::new(0), index: thread.index() };
        match body(&worker) {
            Ok(()) => std::mem::forget(fails),
            Err(reason) => fail(reason),
        }
    });
    error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// One of the threads that run [`on_all_threads`].
#[derive(Debug)]
pub struct Worker<'a> {
    phases: &'a Phases,
    size: usize,
    /// Number of its next phase.
    next: Cell<u32>,
    /// Index of the thread in the pool.
    pub index: usize,
}

impl Worker<'_> {
    /// Begins the next phase, of `units` units, when the previous one is over. The units come in pieces, about `shares` for each
    /// thread, until all are taken. `None` if none is left.
    ///
    /// Read what earlier phases wrote only until you have asked for the last piece: after that, other threads may have gone on.
    ///
    /// # Errors
    /// If another thread failed.
    pub fn phase(&self, units: usize, shares: usize) -> Result<Option<Work<'_>>, Failed> {
        let number = self.next.replace(self.next.get() + 1);
        let piece = units / (self.size * shares);
        self.phases.enter(number, units, piece)
    }
}

struct FailOnDrop<'a>(&'a Phases);

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

/// Values that threads write disjoint parts of in one phase and read in another.
#[derive(Debug)]
pub struct Shared<'a> {
    values: &'a [UnsafeCell<f32>],
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: access is by the contracts of `read` and `write`.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// The values, to be shared.
    pub fn new(values: &'a mut [f32]) -> Self {
        let (start, length) = (values.as_mut_ptr().cast::<UnsafeCell<f32>>(), values.len());
        // SAFETY: `UnsafeCell<f32>` is laid out as `f32`, and the values are borrowed mutably for `'a`.
        let values = unsafe { std::slice::from_raw_parts(start, length) };
        Self { values, borrow: PhantomData }
    }

    /// All values.
    ///
    /// # Safety
    /// No thread writes any of them in this phase.
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

    #[derive(Debug, PartialEq)]
    enum Stop {
        Enough,
        Other,
    }

    impl From<Failed> for Stop {
        fn from(_: Failed) -> Self {
            Self::Other
        }
    }

    fn on(threads: usize, body: impl FnOnce() + Send) {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body);
    }

    #[test]
    fn every_unit_is_done_once_in_every_phase() {
        for threads in [1, 2, 5] {
            on(threads, || {
                let mut values = vec![0.0; 1000];
                let shared = Shared::new(&mut values);
                on_all_threads(|worker| {
                    for phase in 0..300 {
                        let units = [1, 7, 1000][phase % 3];
                        for part in worker.phase(units, 4)?.into_iter().flatten() {
                            // SAFETY: shares are disjoint.
                            unsafe { shared.write(part) }.iter_mut().for_each(|x| *x += 1.0);
                        }
                    }
                    Ok::<_, Failed>(())
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
            let error = on_all_threads(|worker| {
                for phase in 0..10 {
                    for unit in worker.phase(3, 1)?.into_iter().flatten() {
                        match (phase, unit.start) {
                            (4, 1) => return Err(Stop::Enough),
                            (5.., _) => panic!("a phase went on without a thread"),
                            _ => {}
                        }
                    }
                }
                Ok(())
            });
            assert_eq!(error.unwrap_err(), Stop::Enough);
        });
    }
}
