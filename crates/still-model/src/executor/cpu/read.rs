//! Reading a long sequence: blocks of its tokens on several lanes, each a block behind the one before.
//!
//! Only attention needs what came earlier, layer by layer. So a block may pass a layer's attention as soon as the block
//! before it has, and lanes hardly wait for each other; threads that share one block wait at the end of every product,
//! which on two cores costs a quarter of their time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;
use rayon::ThreadPool;
use still_attention::AttentionState;

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::executor::{EachBlock, Wanted};
use crate::model::Model;

/// Tokens of a block: a multiple of every usual chunk, small enough to keep activations small.
const BLOCK: usize = 256;

/// [`Model::read_until`] on the CPU.
pub(super) fn read(
    model: &Model,
    ids: &[u32],
    cache: &mut Cache,
    (wanted, cancel): (Wanted, &Cancel),
    each: &EachBlock<'_>,
) -> Result<()> {
    let start = cache.position(0);
    let blocks = blocks(ids);
    let pools = lanes(blocks.len())?;
    let order = Order::new(cache.layers.len());
    let layers: Vec<_> = cache.layers.iter_mut().map(Mutex::new).collect();
    let reading = Reading { model, cancel, order: &order, layers: &layers };
    // Every so many-th block, beginning with the `first`.
    let run_lane = |first: usize| {
        let unfinished = FailOnDrop(&order);
        for (n, &(at, ids)) in blocks.iter().enumerate().skip(first).step_by(pools.len()) {
            let is_wanted = wanted == Wanted::All || n + 1 == blocks.len();
            let hidden = match reading.block(n, ids, start + at, is_wanted) {
                Ok(hidden) => Some(hidden),
                Err(Stopped::NotWanted) => None,
                Err(Stopped::OtherLane) => return Ok(()),
                Err(Stopped::Failed(error)) => return Err(error),
            };
            if each(at..at + ids.len(), hidden).is_break() {
                return Ok(());
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
            .map(|(n, pool)| scope.spawn(move || pool.install(|| run_lane(n))))
            .collect();
        lanes.into_iter().try_for_each(|lane| {
            lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Where each block begins, and its tokens. Of several the first has half as many: then of two lanes one is half a block behind the
/// other, and both are done at once. Otherwise the one with the last block would end a layer later, and would have met more keys with
/// each of its blocks. Blocks do not depend on the number of lanes, so that results do not.
fn blocks(ids: &[u32]) -> Vec<(usize, &[u32])> {
    let first = if ids.len() > BLOCK { BLOCK / 2 } else { 0 };
    let (first, rest) = ids.split_at(first);
    let rest = rest.chunks(BLOCK);
    let mut at = 0;
    let blocks = std::iter::once(first).filter(|first| !first.is_empty()).chain(rest);
    blocks
        .map(|ids| {
            let start = at;
            at += ids.len();
            (start, ids)
        })
        .collect()
}

/// Why a block did not come through.
enum Stopped {
    /// An earlier one never will.
    OtherLane,
    /// All states have read it, and nobody wants what it comes to.
    NotWanted,
    Failed(ModelError),
}

impl From<ModelError> for Stopped {
    fn from(error: ModelError) -> Self {
        Self::Failed(error)
    }
}

/// What all lanes share.
struct Reading<'a> {
    model: &'a Model,
    cancel: &'a Cancel,
    order: &'a Order,
    layers: &'a [Mutex<&'a mut Box<dyn AttentionState>>],
}

impl Reading<'_> {
    /// Hidden states `[n, E]` of block `n`, whose first token is at position `start`; only the states read a block that is not wanted.
    fn block(
        &self,
        n: usize,
        ids: &[u32],
        start: usize,
        is_wanted: bool,
    ) -> std::result::Result<Tensor, Stopped> {
        let decoder = &self.model.decoder;
        let (x, rotation) = (decoder.embed(ids)?, decoder.rotation(start, ids.len())?);
        let hidden = self.model.through_layers(x, &rotation, |layer, inputs| {
            let _turn = self.order.wait_for(layer, n).ok_or(Stopped::OtherLane)?;
            if self.cancel.is_raised() {
                return Err(Stopped::Failed(ModelError::Cancelled));
            }
            let attention = lock(&self.layers[layer]).advance(inputs.rows(), None);
            let attention = attention.map_err(ModelError::from)?;
            match is_wanted || layer + 1 < self.layers.len() {
                true => Ok(attention),
                false => Err(Stopped::NotWanted),
            }
        })?;
        Ok(hidden.squeeze(0).map_err(ModelError::from)?)
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
    fn wait_for(&self, layer: usize, block: usize) -> Option<LayerGuard<'_>> {
        let waiting = |next: &mut Next| !next.failed && next.block[layer] != block;
        let next = self.changed.wait_while(lock(&self.next), waiting);
        let next = next.unwrap_or_else(PoisonError::into_inner);
        if next.failed { None } else { Some(LayerGuard { order: self, layer }) }
    }

    fn change(&self, change: impl FnOnce(&mut Next)) {
        change(&mut lock(&self.next));
        self.changed.notify_all();
    }
}

/// A block's stay in a layer; dropping it lets the next one in.
struct LayerGuard<'a> {
    order: &'a Order,
    layer: usize,
}

impl Drop for LayerGuard<'_> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_all_tokens_in_order() {
        let ids: Vec<u32> = (0..1000).collect();
        for n in [0, 1, BLOCK, BLOCK + 1, 2 * BLOCK, 1000] {
            let mut next = 0;
            for (at, tokens) in blocks(&ids[..n]) {
                assert!(at == next && (1..=BLOCK).contains(&tokens.len()), "{n}");
                assert_eq!(tokens, &ids[at..at + tokens.len()]);
                next += tokens.len();
            }
            assert_eq!(next, n);
        }
    }

    #[test]
    fn two_lanes_have_as_many_tokens_and_as_many_before_them() {
        let ids = vec![0; 30 * BLOCK];
        let blocks = blocks(&ids);
        let work = |lane: usize| {
            blocks.iter().skip(lane).step_by(2).fold((0, 0), |(tokens, pairs), (at, ids)| {
                (tokens + ids.len(), pairs + ids.len() * (2 * at + ids.len()) / 2)
            })
        };
        assert_eq!(work(0).0, work(1).0);
        // Half a block's square apart; of whole blocks it would be 15 squares.
        assert!(work(0).1.abs_diff(work(1).1) <= BLOCK * BLOCK / 2, "{:?}, {:?}", work(0), work(1));
    }
}
