//! The candidate tokens of a draw, found without sorting the vocabulary.

use std::cmp::Ordering;

use still_compute::vector::{exp_sub_sum, max, vectorize};

/// Logits whose largest is looked at for all of them.
const BLOCK: usize = 64;

/// How many of the likeliest tokens may be drawn.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    top_k: usize,
    top_p: f64,
    min_p: f64,
    /// Of every token, the likeliest has 1.
    weights: Vec<f32>,
    /// Ids that are looked at.
    ids: Vec<u32>,
    /// The largest logit of each block.
    largest: Vec<f32>,
}

impl Choice {
    pub fn new(top_k: usize, top_p: f64, min_p: f64) -> Self {
        Self { top_k, top_p, min_p, weights: Vec::new(), ids: Vec::new(), largest: Vec::new() }
    }

    /// Ids in ascending order and what they are drawn by.
    pub fn of<'a>(
        &'a mut self,
        logits: &'a [f32],
        temperature: f64,
    ) -> impl Iterator<Item = (u32, f64)> + Clone + 'a {
        let (total, largest) = self.weigh(logits, temperature);
        let last = self.last_kept(logits, total);
        let least = self.min_p * largest;
        let order = by_logit(logits);
        let all = self.weights.iter().enumerate();
        let all = all.map(|(id, &weight)| (id as u32, f64::from(weight)));
        all.filter(move |(id, weight)| {
            *weight >= least && last.is_none_or(|last| order(id, &last).is_le())
        })
    }

    /// Weighs all tokens. The sum of the weights, and the largest.
    fn weigh(&mut self, logits: &[f32], temperature: f64) -> (f64, f64) {
        let (weights, scale) = (&mut self.weights, temperature.recip());
        weights.resize(logits.len(), 0.0);
        let (total, largest) = vectorize(
            #[inline(always)]
            || {
                let largest = f64::from(max(logits));
                for (weight, &logit) in weights.iter_mut().zip(logits) {
                    let below = f64::from(logit) - largest;
                    // 0 × ∞ at the smallest temperatures.
                    *weight = if below == 0.0 { 0.0 } else { (below * scale) as f32 };
                }
                (exp_sub_sum(weights, 0.0), max(weights))
            },
        );
        (f64::from(total), f64::from(largest))
    }

    /// The least likely token that `top_k` and `top_p` leave; none if they leave all.
    fn last_kept(&mut self, logits: &[f32], total: f64) -> Option<u32> {
        let limited = self.top_k > 0 && self.top_k < logits.len();
        if !limited && self.top_p >= 1.0 {
            return None;
        }
        let mut order = by_logit(logits);
        let mut total = total;
        if limited {
            self.collect_top_k(logits);
            self.ids.select_nth_unstable_by(self.top_k - 1, &mut order);
            self.ids.truncate(self.top_k);
            if self.top_p >= 1.0 {
                return self.ids.last().copied();
            }
            total = self.ids.iter().map(|&id| f64::from(self.weights[id as usize])).sum();
        } else {
            // All that are left out together have less than half of what top_p leaves out.
            let least = 0.5 * (1.0 - self.top_p) * total / logits.len() as f64;
            let weights = self.weights.iter().enumerate();
            let large = weights.filter(|&(_, &weight)| f64::from(weight) >= least);
            self.ids.clear();
            self.ids.extend(large.map(|(id, _)| id as u32));
        }
        self.last_of_nucleus(self.top_p * total, order)
    }

    /// Ids with the `top_k` largest logits among them.
    fn collect_top_k(&mut self, logits: &[f32]) {
        let Self { top_k, largest, ids, .. } = self;
        largest.clear();
        largest.extend(logits.chunks(BLOCK).map(max));
        // As many blocks as tokens are asked for have a logit of at least `least`.
        let least = match largest.len() >= *top_k {
            true => *largest.select_nth_unstable_by(*top_k - 1, |a, b| b.total_cmp(a)).1,
            false => f32::NEG_INFINITY,
        };
        let all = logits.iter().enumerate();
        ids.clear();
        ids.extend(all.filter(|&(_, &logit)| logit >= least).map(|(id, _)| id as u32));
    }

    /// The last of the smallest set of likeliest ids whose weights sum up to `share`.
    fn last_of_nucleus(
        &mut self,
        share: f64,
        mut order: impl FnMut(&u32, &u32) -> Ordering,
    ) -> Option<u32> {
        let (ids, weights) = (&mut self.ids, &self.weights);
        // It is in `from..to`; those before `from` have the weight `before`.
        let (mut from, mut to, mut before) = (0, ids.len(), 0.0);
        while to - from > 1 {
            let half = (to - from) / 2;
            ids[from..to].select_nth_unstable_by(half, &mut order);
            let first = ids[from..from + half].iter().map(|&id| f64::from(weights[id as usize]));
            let with_half = before + first.sum::<f64>();
            match with_half < share {
                true => (from, before) = (from + half, with_half),
                false => to = from + half,
            }
        }
        ids.get(from).copied()
    }
}

/// Likelier first, of equals the lower id.
fn by_logit(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + Copy {
    |a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}
