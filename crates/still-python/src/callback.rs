//! A Python callable that receives progress from worker threads.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use serde::Serialize;
use still_model::Cancel;

use crate::arguments::to_python;
use crate::work::work;

/// A callable, if there is one. What it raises ends the work, and is what the call raises.
#[derive(Clone)]
pub struct Callback {
    callable: Option<Arc<Py<PyAny>>>,
    raised: Arc<Mutex<Option<PyErr>>>,
    cancel: Cancel,
}

impl Callback {
    /// Of a callable that takes one dict.
    pub fn new(callable: Option<Py<PyAny>>) -> Self {
        let callable = callable.map(Arc::new);
        Self { callable, raised: Arc::default(), cancel: Cancel::default() }
    }

    /// The flag of the work, which an exception raises too.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Calls it with an event.
    pub fn tell(&self, event: &impl Serialize) {
        let Some(callable) = self.callable.as_ref().filter(|_| !self.cancel.is_raised()) else {
            return;
        };
        // None: the interpreter ends.
        let called =
            Python::try_attach(|py| callable.call1(py, (to_python(py, event)?,)).map(drop));
        if let Some(Ok(())) = called {
            return;
        }
        self.cancel.raise();
        let raised = called.and_then(Result::err);
        *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = raised;
    }

    /// [`work`], and what the callable raised meanwhile.
    ///
    /// # Errors
    /// As [`work`]; the callable's own.
    pub fn work<T: Send + 'static>(
        &self,
        py: Python<'_>,
        body: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> PyResult<T> {
        let done = work(py, self.cancel.clone(), body);
        match self.raised.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(raised) => Err(raised),
            None => done,
        }
    }
}
