//! Choosing the next token.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_compute::vector::{max, vectorize};

/// Seeded sampling from logits.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    top_k: usize,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off.
    pub fn new(temperature: f64, top_p: f64, top_k: usize, seed: u64) -> Self {
        Self { temperature, top_p, top_k, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// The id of the next token; of equal logits the lowest id.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.temperature <= 0.0 || logits.is_empty() {
            return likeliest(logits);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let max = f64::from(logits[order[0]]);
        let weights: Vec<f64> = order
            .iter()
            .map(|&id| ((f64::from(logits[id]) - max) / self.temperature).exp())
            .collect();
        // The smallest set whose share reaches top_p; at least the best.
        let total: f64 = weights.iter().sum();
        let mut share = 0.0;
        let mut kept = 0;
        while kept < weights.len() && (kept == 0 || share < self.top_p * total) {
            share += weights[kept];
            kept += 1;
        }
        let mut point = self.rng.random::<f64>() * share;
        for (weight, &id) in weights[..kept].iter().zip(&order) {
            point -= weight;
            if point < 0.0 {
                return id as u32;
            }
        }
        order[kept - 1] as u32
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

    #[test]
    fn zero_temperature_is_greedy_and_ties_take_the_lowest_id() {
        assert_eq!(Sampler::new(0.0, 1.0, 0, 0).sample(&LOGITS), 1);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let draw = |seed| -> Vec<u32> {
            let mut sampler = Sampler::new(1.0, 1.0, 0, seed);
            (0..50).map(|_| sampler.sample(&LOGITS)).collect()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let mut narrow = Sampler::new(1.0, 1.0, 2, 1);
        let mut nucleus = Sampler::new(1.0, 0.6, 0, 1);
        for _ in 0..200 {
            assert!([1, 2].contains(&narrow.sample(&LOGITS)));
            assert!([1, 2].contains(&nucleus.sample(&LOGITS)));
        }
        assert_eq!(Sampler::new(1.0, 0.0, 0, 1).sample(&LOGITS), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let mut sampler = Sampler::new(1.0, 1.0, 0, 3);
        let hits = (0..4000).filter(|_| sampler.sample(&[0.0, 1.0]) == 1).count();
        let expected = 1.0_f64.exp() / (1.0 + 1.0_f64.exp());
        assert!((hits as f64 / 4000.0 - expected).abs() < 0.03);
    }
}
