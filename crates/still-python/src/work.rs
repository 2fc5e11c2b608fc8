//! Runs work on a separate thread without Python's lock. The caller's thread waits and checks for Ctrl-C.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use pyo3::prelude::*;
use still_model::{Cancel, ModelError};

use crate::errors::{exception, panicked};

/// How often it looks.
const PERIOD: Duration = Duration::from_millis(50);
/// How long work that is asked to stop is waited for. What goes on longer ends in the background, and nobody hears of it.
const PATIENCE: Duration = Duration::from_millis(500);
/// As a program's first thread has.
const STACK_BYTES: usize = 8 << 20;

/// Work that was begun.
pub struct Job<T> {
    outcome: Receiver<thread::Result<anyhow::Result<T>>>,
    cancel: Cancel,
}

/// How a cancelled computation that knows no flag unwinds.
struct Unwound;

/// Ends the computation that called back, if it was cancelled. Only for callbacks that are called where unwinding loses nothing.
pub fn unwind_if(cancel: &Cancel) {
    if cancel.is_raised() {
        resume_unwind(Box::new(Unwound));
    }
}

impl<T: Send + 'static> Job<T> {
    /// Begins it. It looks at `cancel` by itself.
    ///
    /// # Errors
    /// A system that gives no thread.
    pub fn begin(
        py: Python<'_>,
        cancel: Cancel,
        body: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> PyResult<Self> {
        let (tell, outcome) = channel();
        let run = move || {
            let _ = tell.send(catch_unwind(AssertUnwindSafe(body)));
        };
        let thread = thread::Builder::new().name("still".into()).stack_size(STACK_BYTES);
        let started = thread.spawn(run).context("cannot start a thread");
        started.map_err(|error| exception(py, &error))?;
        Ok(Self { outcome, cancel })
    }

    /// Asks it to stop.
    pub fn cancel(&self) {
        self.cancel.raise();
    }

    /// Its result.
    ///
    /// # Errors
    /// Its own, a panic, and what a signal's handler raised (KeyboardInterrupt), after which it is asked to stop.
    pub fn wait(&self, py: Python<'_>) -> PyResult<T> {
        loop {
            if let Some(outcome) = self.look(py, PERIOD)? {
                return outcome;
            }
        }
    }

    /// Waits a moment; its result, if it is there.
    ///
    /// # Errors
    /// What a signal's handler raised, after which the work is asked to stop.
    pub fn look(&self, py: Python<'_>, moment: Duration) -> PyResult<Option<PyResult<T>>> {
        let this = AssertUngil(&self.outcome);
        let received = py.detach(move || this.receive(moment));
        match received {
            Ok(Ok(result)) => Ok(Some(result.map_err(|error| exception(py, &error)))),
            Ok(Err(payload)) => Ok(Some(Err(unwound(py, payload.as_ref())))),
            // Its outcome was told before: to whom a signal's handler then raised.
            Err(RecvTimeoutError::Disconnected) => {
                Ok(Some(Err(exception(py, &ModelError::Cancelled.into()))))
            }
            Err(RecvTimeoutError::Timeout) => {
                py.check_signals().inspect_err(|_| self.stop(py))?;
                Ok(None)
            }
        }
    }

    fn stop(&self, py: Python<'_>) {
        self.cancel();
        let asked = Instant::now();
        let this = AssertUngil(&self.outcome);
        // In vain if it waits for Python's lock to tell of its progress: so the lock is not held.
        py.detach(move || {
            let _ = this.receive(PATIENCE.saturating_sub(asked.elapsed()));
        });
    }
}

/// A receiver has one user: whoever holds its job.
struct AssertUngil<'a, T>(&'a Receiver<T>);

// SAFETY: the thread that waits is the one that held Python's lock, and it is the only one that has the receiver meanwhile.
unsafe impl<T: Send> Send for AssertUngil<'_, T> {}

impl<T> AssertUngil<'_, T> {
    fn receive(&self, moment: Duration) -> Result<T, RecvTimeoutError> {
        self.0.recv_timeout(moment)
    }
}

fn unwound(py: Python<'_>, payload: &(dyn Any + Send)) -> PyErr {
    match payload.is::<Unwound>() {
        true => exception(py, &ModelError::Cancelled.into()),
        false => panicked(py, payload),
    }
}

/// Does `body` without Python's lock, and gives its result.
///
/// # Errors
/// As [`Job::wait`].
pub fn work<T: Send + 'static>(
    py: Python<'_>,
    cancel: Cancel,
    body: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> PyResult<T> {
    Job::begin(py, cancel, body)?.wait(py)
}
