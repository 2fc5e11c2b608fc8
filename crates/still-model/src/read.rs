//! Prefill of one sequence.

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{IndexOp, Tensor};

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::executor::{Wanted, executor};
use crate::model::Model;

/// A callback for the progress of prefill: `(more, of)` tokens, first with `more = 0`. Several threads call it. Clones share it.
#[derive(Clone, Default)]
pub struct OnRead(Option<Arc<dyn Fn(usize, usize) + Send + Sync>>);

impl OnRead {
    /// Calls `listener(more, of)`.
    pub fn new(listener: impl Fn(usize, usize) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    /// Reports that `more` of `total` tokens have been read.
    pub fn tell(&self, more: usize, total: usize) {
        if let Some(listener) = &self.0 {
            listener(more, total);
        }
    }
}

impl fmt::Debug for OnRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "OnRead(…)" } else { "OnRead" })
    }
}

/// Equal if both share one listener, or have none.
impl PartialEq for OnRead {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        }
    }
}

impl Model {
    /// Feeds one sequence. `each` receives the position in `ids` and the final-normed hidden states `[n, E]` of every block of
    /// tokens, from several threads and not always in order.
    ///
    /// The result does not depend on the number of threads. On CUDA all tokens go through a layer together, and `each` is called
    /// in order on the calling thread.
    ///
    /// # Errors
    /// An id outside the vocabulary, a cache of another model or of several sequences, an error of `each`. The cache has then
    /// read an unknown part of `ids`.
    pub fn read<E: From<ModelError> + Send>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        each: impl Fn(usize, Tensor) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        self.read_until(ids, cache, &Cancel::default(), each)
    }

    /// [`Model::read`], which ends with [`ModelError::Cancelled`] at the next layer once `cancel` is raised.
    ///
    /// # Errors
    /// As [`Model::read`].
    pub fn read_until<E: From<ModelError> + Send>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        cancel: &Cancel,
        each: impl Fn(usize, Tensor) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        self.read_blocks(ids, cache, (Wanted::All, cancel), |block, hidden| match hidden {
            Some(hidden) => each(block.start, hidden),
            None => unreachable!("all hidden states are wanted"),
        })
    }

    /// [`Model::read_until`] for the hidden states that are wanted.
    pub(crate) fn read_blocks<E: From<ModelError> + Send>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        how: (Wanted, &Cancel),
        each: impl Fn(Range<usize>, Option<Tensor>) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        self.check_cache(cache, 1)?;
        let failed = Mutex::new(None);
        let each = |block, hidden| match each(block, hidden) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                ControlFlow::Break(())
            }
        };
        let read = executor(self.device()).and_then(|on| on.read(self, ids, cache, how, &each));
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(read?),
        }
    }

    /// Feeds one sequence's prompt and returns the last token's hidden state, `[1, E]`.
    ///
    /// # Errors
    /// An empty prompt, an id outside the vocabulary; as [`Model::read`].
    pub fn prefill(&self, ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
        self.prefill_until(ids, cache, &Cancel::default(), &OnRead::default())
    }

    /// [`Model::prefill`], which reports to `on_read` and ends with [`ModelError::Cancelled`] once `cancel` is raised.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn prefill_until(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        cancel: &Cancel,
        on_read: &OnRead,
    ) -> Result<Tensor> {
        let last = Mutex::new(None);
        on_read.tell(0, ids.len());
        self.read_blocks(ids, cache, (Wanted::Last, cancel), |block, hidden| {
            let rows = block.len();
            on_read.tell(rows, ids.len());
            if let Some(hidden) = hidden.filter(|_| block.end == ids.len()) {
                *last.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(hidden.i(rows - 1..rows)?);
            }
            Ok::<_, ModelError>(())
        })?;
        let last = last.into_inner().unwrap_or_else(PoisonError::into_inner);
        last.ok_or_else(|| ModelError::Invalid("the prompt has no tokens".into()))
    }
}
