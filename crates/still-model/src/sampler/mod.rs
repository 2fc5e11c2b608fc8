//! Choosing the next token.

mod choice;
#[cfg(test)]
mod naive;

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_compute::vector::{max, vectorize};

use self::choice::Choice;
use crate::generate::GenerateOptions;

/// Seeded sampling from logits.
///
/// In order: the penalties of what was sampled so far change logits, `temperature` divides them, then `top_k`, `top_p` and `min_p`
/// each leave some of the tokens that the one before left. What is left is drawn from by its probabilities.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f64,
    choice: Choice,
    penalties: Penalties,
    /// How often each id was sampled.
    counts: HashMap<u32, u32>,
    /// Logits with penalties.
    penalized: Vec<f32>,
    rng: ChaCha8Rng,
}

/// What makes a token that was sampled before less likely, or more.
#[derive(Clone, Copy, Debug)]
struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
}

impl Sampler {
    /// A sampler that has sampled nothing yet.
    pub fn new(options: &GenerateOptions) -> Self {
        Self {
            temperature: options.temperature,
            choice: Choice::new(options.top_k, options.top_p, options.min_p),
            penalties: Penalties {
                repetition: options.repetition_penalty as f32,
                presence: options.presence_penalty as f32,
                frequency: options.frequency_penalty as f32,
            },
            counts: HashMap::new(),
            penalized: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(options.seed),
        }
    }

    /// The id of the next token; of equal logits the lowest id. No pass sorts the vocabulary.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let mut penalized = std::mem::take(&mut self.penalized);
        let id = self.draw(self.with_penalties(logits, &mut penalized));
        self.penalized = penalized;
        if !self.penalties.are_off() {
            *self.counts.entry(id).or_default() += 1;
        }
        id
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        if self.temperature <= 0.0 || logits.is_empty() {
            return likeliest(logits);
        }
        let kept = self.choice.of(logits, self.temperature);
        let share: f64 = kept.clone().map(|(_, weight)| weight).sum();
        let mut point = self.rng.random::<f64>() * share;
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

    /// The logits, or `buffer` with what the penalties make of them.
    fn with_penalties<'a>(&self, logits: &'a [f32], buffer: &'a mut Vec<f32>) -> &'a [f32] {
        if self.counts.is_empty() {
            return logits;
        }
        buffer.clear();
        buffer.extend_from_slice(logits);
        for (&id, &count) in &self.counts {
            if let Some(logit) = buffer.get_mut(id as usize) {
                *logit = self.penalties.of(*logit, count);
            }
        }
        buffer
    }
}

impl Penalties {
    fn are_off(&self) -> bool {
        (self.repetition, self.presence, self.frequency) == (1.0, 0.0, 0.0)
    }

    /// The logit of a token that was sampled `count` times.
    fn of(&self, logit: f32, count: u32) -> f32 {
        let logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        logit - self.presence - self.frequency * count as f32
    }
}

/// The id with the largest logit, the lowest of equals.
pub fn likeliest(logits: &[f32]) -> u32 {
    let max = vectorize(
        #[inline(always)]
        || max(logits),
    );
    logits.iter().position(|&x| x == max || x.is_nan()).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 3.0, -2.0];

    fn sampler(temperature: f64, top_p: f64, top_k: usize, seed: u64) -> Sampler {
        let options = GenerateOptions { temperature, top_p, top_k, seed, ..Default::default() };
        Sampler::new(&options)
    }

    #[test]
    fn zero_temperature_is_greedy_and_ties_take_the_lowest_id() {
        assert_eq!(sampler(0.0, 1.0, 0, 0).sample(&LOGITS), 1);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let draw = |seed| -> Vec<u32> {
            let mut sampler = sampler(1.0, 1.0, 0, seed);
            (0..50).map(|_| sampler.sample(&LOGITS)).collect()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let mut narrow = sampler(1.0, 1.0, 2, 1);
        let mut nucleus = sampler(1.0, 0.6, 0, 1);
        for _ in 0..200 {
            assert!([1, 2].contains(&narrow.sample(&LOGITS)));
            assert!([1, 2].contains(&nucleus.sample(&LOGITS)));
        }
        assert_eq!(sampler(1.0, 0.0, 0, 1).sample(&LOGITS), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let mut sampler = sampler(1.0, 1.0, 0, 3);
        let hits = (0..4000).filter(|_| sampler.sample(&[0.0, 1.0]) == 1).count();
        let expected = 1.0_f64.exp() / (1.0 + 1.0_f64.exp());
        assert!((hits as f64 / 4000.0 - expected).abs() < 0.03);
    }

    #[test]
    fn penalties_count_what_was_sampled() {
        let options = GenerateOptions { repetition_penalty: 2.0, ..Default::default() };
        let mut sampler = Sampler::new(&options);
        let drawn: Vec<u32> = (0..5).map(|_| sampler.sample(&LOGITS)).collect();
        // 3, 3 and 1 become 1.5, 1.5 and 0.5.
        assert_eq!(drawn, [1, 2, 1, 1, 1]);
        let options = GenerateOptions { frequency_penalty: 1.5, ..Default::default() };
        let mut sampler = Sampler::new(&options);
        let drawn: Vec<u32> = (0..5).map(|_| sampler.sample(&LOGITS)).collect();
        assert_eq!(drawn, [1, 2, 1, 2, 0]);
        let options = GenerateOptions { presence_penalty: 2.5, ..Default::default() };
        let mut sampler = Sampler::new(&options);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.sample(&LOGITS)).collect();
        assert_eq!(drawn, [1, 2, 0, 1]);
    }
}
