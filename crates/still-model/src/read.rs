//! Reading a long sequence: blocks of its tokens on several lanes, each a block behind the one before.
//!
//! Only attention needs what came earlier, layer by layer. So a block may pass a layer's attention as soon as the block
//! before it has, and lanes hardly wait for each other; threads that share one block wait at the end of every product,
//! which on two cores costs a quarter of their time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::{IndexOp, Tensor};
use rayon::ThreadPool;

use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::model::{Cache, LayerCache, Model};

/// Tokens of a block: a multiple of every usual chunk, small enough to keep activations small.
const BLOCK: usize = 256;

impl Model {
    /// Feeds one sequence; `each` is given the final-normed hidden states `[n, E]` of every block of tokens and where
    /// in `ids` it starts, from several threads and not always in order.
    ///
    /// The result does not depend on the number of threads. On CUDA all tokens go through a layer together, and blocks come in
    /// order from the calling thread.
    ///
    /// # Errors
    /// An id outside the vocabulary, a cache of another model or of several sequences, an error of `each`. The cache has
    /// then been fed an unknown part of `ids`.
    pub fn read<E: From<ModelError> + Send>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        each: impl Fn(usize, Tensor) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        self.read_until(ids, cache, &Cancel::default(), each)
    }

    /// [`Model::read`], given up with [`ModelError::Cancelled`] at the next layer once `cancel` is raised.
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
        self.check_cache(cache, 1)?;
        #[cfg(feature = "cuda")]
        if self.decoder.device().is_cuda() {
            return self.read_on_cuda(ids, cache, cancel, each);
        }
        let start = cache.position(0);
        let blocks: Vec<(usize, &[u32])> =
            ids.chunks(BLOCK).enumerate().map(|(n, ids)| (n * BLOCK, ids)).collect();
        let pools = lanes(blocks.len())?;
        let order = Order::new(cache.layers.len());
        let layers: Vec<_> = cache.layers.iter_mut().map(Mutex::new).collect();
        // Every so many-th block, beginning with the `first`.
        let run_lane = |first: usize| {
            let unfinished = FailOnDrop(&order);
            for (n, &(at, ids)) in blocks.iter().enumerate().skip(first).step_by(pools.len()) {
                match self.read_block(n, ids, start + at, cancel, &order, &layers)? {
                    Some(hidden) => each(at, hidden)?,
                    None => return Ok(()),
                }
            }
            std::mem::forget(unfinished);
            Ok(())
        };
        let run_lane = &run_lane;
        std::thread::scope(|scope| {
            let lanes: Vec<_> = pools
                .iter()
                .enumerate()
                .map(|(lane, pool)| scope.spawn(move || pool.install(|| run_lane(lane))))
                .collect();
            lanes.into_iter().try_for_each(|lane| {
                lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }

    /// One block through all layers; `None` if another lane failed.
    fn read_block(
        &self,
        n: usize,
        ids: &[u32],
        start: usize,
        cancel: &Cancel,
        order: &Order,
        layers: &[Mutex<&mut LayerCache>],
    ) -> Result<Option<Tensor>> {
        let rotation = self.decoder.rotation(start, ids.len())?;
        let x = self.decoder.embed(ids)?;
        let hidden = self.through_layers(x, &rotation, |layer, inputs| {
            let Some(_turn) = order.wait_for(layer, n) else { return Ok(None) };
            if cancel.is_raised() {
                return Err(ModelError::Cancelled);
            }
            lock(&layers[layer]).advance(inputs, None).map(Some)
        })?;
        Ok(hidden.map(|hidden| hidden.squeeze(0)).transpose()?)
    }

    /// Feeds one sequence's prompt; returns the last token's hidden state, `[1, E]`.
    ///
    /// # Errors
    /// An empty prompt, an id outside the vocabulary; as [`Model::read`].
    pub fn prefill(&self, ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
        self.prefill_until(ids, cache, &Cancel::default())
    }

    /// [`Model::prefill`], given up with [`ModelError::Cancelled`] once `cancel` is raised.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn prefill_until(&self, ids: &[u32], cache: &mut Cache, cancel: &Cancel) -> Result<Tensor> {
        let last = Mutex::new(None);
        self.read_until(ids, cache, cancel, |start, hidden| {
            let rows = hidden.dim(0)?;
            if start + rows == ids.len() {
                *lock(&last) = Some(hidden.i(rows - 1..rows)?);
            }
            Ok::<_, ModelError>(())
        })?;
        let last = last.into_inner().unwrap_or_else(PoisonError::into_inner);
        last.ok_or_else(|| ModelError::Invalid("the prompt has no tokens".into()))
    }
}

/// Threads shared out to at most `blocks` lanes; a lane's products stay on its own.
///
/// # Errors
/// If the system gives no threads.
pub fn lanes(blocks: usize) -> Result<Vec<ThreadPool>> {
    let threads = rayon::current_num_threads();
    let lanes = threads.min(blocks).max(1);
    (0..lanes)
        .map(|lane| {
            let share = threads / lanes + usize::from(lane < threads % lanes);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(share).build();
            pool.map_err(|error| ModelError::NotFound {
                what: format!("no threads to read with: {error}"),
                hint: "raise the limit on processes (ulimit -u), or use fewer threads".into(),
            })
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which block is next at each layer.
struct Order {
    next: Mutex<Next>,
    changed: Condvar,
}

struct Next {
    /// By layer.
    block: Vec<usize>,
    failed: bool,
}

impl Order {
    fn new(layers: usize) -> Self {
        let next = Next { block: vec![0; layers], failed: false };
        Self { next: Mutex::new(next), changed: Condvar::new() }
    }

    /// Returns when every earlier block has passed `layer`; `None` if one never will.
    fn wait_for(&self, layer: usize, block: usize) -> Option<Turn<'_>> {
        let waiting = |next: &mut Next| !next.failed && next.block[layer] != block;
        let next = self.changed.wait_while(lock(&self.next), waiting);
        let next = next.unwrap_or_else(PoisonError::into_inner);
        if next.failed { None } else { Some(Turn { order: self, layer }) }
    }

    fn change(&self, change: impl FnOnce(&mut Next)) {
        change(&mut lock(&self.next));
        self.changed.notify_all();
    }
}

/// A block's stay in a layer; dropping it lets the next one in.
struct Turn<'a> {
    order: &'a Order,
    layer: usize,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.order.change(|next| next.block[self.layer] += 1);
    }
}

/// Wakes the lanes that would wait forever for one that returned early or panicked.
struct FailOnDrop<'a>(&'a Order);

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        self.0.change(|next| next.failed = true);
    }
}
