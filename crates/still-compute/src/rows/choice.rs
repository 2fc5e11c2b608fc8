//! The candidate tokens of a draw, found without sorting the vocabulary, and the likeliest.

use std::cmp::Ordering;

use crate::vector::{exp_sub_sum, max, vectorize};

/// Logits whose largest is looked at for all of them.
const BLOCK: usize = 64;

/// How many of the likeliest tokens may be drawn.
#[derive(Clone, Debug)]
pub struct Choice {
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
    /// By the limits of sampling: 0 and 1 stand for none.
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

    /// The token at `point`, 0 … 1, of the weights of all that may be drawn; 0 if none may.
    pub fn draw(&mut self, logits: &[f32], temperature: f64, point: f64) -> u32 {
        let kept = self.of(logits, temperature);
        let share: f64 = kept.clone().map(|(_, weight)| weight).sum();
        let mut point = point * share;
        let mut last = 0;
        for (id, weight) in kept.filter(|(_, weight)| *weight > 0.0) {
            point -= weight;
            last = id;
            if point < 0.0 {
                break;
            }
        }
        last
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

/// The id with the largest logit, the lowest of equals.
pub fn likeliest(logits: &[f32]) -> u32 {
    // Only the block that has it is looked at one by one.
    const BLOCK: usize = 1024;
    let (first, largest) = vectorize(
        #[inline(always)]
        || {
            let (mut first, mut largest) = (0, f32::NEG_INFINITY);
            for (n, block) in logits.chunks(BLOCK).enumerate() {
                let of_block = max(block);
                if of_block > largest || (of_block.is_nan() && !largest.is_nan()) {
                    (first, largest) = (n * BLOCK, of_block);
                }
            }
            (first, largest)
        },
    );
    let within = logits[first..].iter().position(|&x| x == largest || x.is_nan());
    (first + within.unwrap_or(0)) as u32
}

/// Whether a logit is no number, as those of damaged weights are.
pub fn any_nan(logits: &[f32]) -> bool {
    let largest = vectorize(
        #[inline(always)]
        || max(logits),
    );
    largest.is_nan()
}
