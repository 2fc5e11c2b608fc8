//! In which order windows are read: a function of the seed and of how many were read, never of a replay.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::recipe::MAX_LENGTHS;

/// How far a run has read: all that a resumed run needs to go on in the middle of an epoch, of every source and length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Position {
    /// Windows handed out since the beginning, over all epochs.
    pub windows: usize,
    /// Times that windows were asked for: steps, of both stages.
    pub steps: usize,
    /// Windows handed out of each length, in the recipe's order.
    pub drawn: [usize; MAX_LENGTHS],
}

/// What randomness is for: each purpose has its own streams, one an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// The order of a group of a view.
    Order { view: usize, group: usize },
    /// The order in which a view draws from its groups.
    Draws { view: usize },
    /// Which blocks are read at which length.
    Lengths,
    /// Which documents meet in a window.
    Packing,
    /// Which of the held-out windows are kept.
    HeldOut,
    /// The length of a step.
    Steps,
}

impl Purpose {
    pub fn rng(self, seed: u64, epoch: usize) -> ChaCha8Rng {
        let number = match self {
            Self::Order { view, group } => view + MAX_LENGTHS * group,
            Self::Draws { view } => (1 << 22) + view,
            Self::Lengths => (1 << 22) + MAX_LENGTHS,
            Self::Packing => (1 << 22) + MAX_LENGTHS + 1,
            Self::HeldOut => (1 << 22) + MAX_LENGTHS + 2,
            Self::Steps => (1 << 22) + MAX_LENGTHS + 3,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch as u64 | (number as u64) << 40);
        rng
    }
}

/// `0..count` in the order of an epoch.
pub(super) fn shuffled(count: usize, seed: u64, purpose: Purpose, epoch: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    order.shuffle(&mut purpose.rng(seed, epoch));
    order
}

/// Draws from several groups: the group of each, and how many draws it had before.
type Draws = Vec<(u32, u32)>;

/// By what it is of: an epoch, and what was made for it.
type Known<K, V> = Mutex<HashMap<K, (usize, Arc<V>)>>;

/// Orders that were asked for last, one of each purpose: reading on costs no shuffle.
#[derive(Debug, Default)]
pub(super) struct Orders {
    orders: Known<Purpose, Vec<u32>>,
    draws: Known<usize, Draws>,
}

impl Orders {
    /// The order of an epoch of a group of `count` windows.
    pub fn order(&self, count: usize, seed: u64, purpose: Purpose, epoch: usize) -> Arc<Vec<u32>> {
        let mut known = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || (epoch, Arc::new(shuffled(count, seed, purpose, epoch)));
        let entry = known.entry(purpose).or_insert_with(make);
        if entry.0 != epoch {
            *entry = make();
        }
        entry.1.clone()
    }

    /// The draws of an epoch, of which every group has as many as `counts` says.
    pub fn draws(&self, counts: &[usize], seed: u64, view: usize, epoch: usize) -> Arc<Draws> {
        let mut known = self.draws.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let mut draws: Draws = Vec::with_capacity(counts.iter().sum());
            for (group, &count) in counts.iter().enumerate() {
                draws.extend(std::iter::repeat_n((group as u32, 0), count));
            }
            draws.shuffle(&mut Purpose::Draws { view }.rng(seed, epoch));
            let mut had = vec![0; counts.len()];
            for (group, before) in &mut draws {
                *before = had[*group as usize];
                had[*group as usize] += 1;
            }
            (epoch, Arc::new(draws))
        };
        let entry = known.entry(view).or_insert_with(make);
        if entry.0 != epoch {
            *entry = make();
        }
        entry.1.clone()
    }
}
