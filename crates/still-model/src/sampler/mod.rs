//! Sampling of the next token.
//!
//! | file | content |
//! |---|---|
//! | `constraint` | constraints, such as a grammar |
//! | `naive` | the slow twin, for tests |

mod constraint;
#[cfg(test)]
mod naive;

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_compute::rows::Choice;
pub use still_compute::rows::{any_nan, likeliest};

pub use self::constraint::{Constraint, Constraints};
use crate::error::{ModelError, Result};
use crate::generate::GenerateOptions;

/// Seeded sampling from logits.
///
/// In order: the penalties of what was sampled so far change logits, `logit_bias` is added to them, a constraint takes out the
/// tokens that it does not allow, `temperature` divides the logits, then `top_k`, `top_p` and `min_p` each leave some of the
/// tokens that the one before left. What is left is drawn from by its probabilities.
#[derive(Debug)]
pub struct Sampler {
    temperature: f64,
    choice: Choice,
    penalties: Penalties,
    bias: Vec<(u32, f32)>,
    constraint: Option<Box<dyn Constraint>>,
    /// How often each id was sampled.
    counts: HashMap<u32, u32>,
    /// Logits with penalties, biases and the constraint.
    changed: Vec<f32>,
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
            bias: options.logit_bias.clone(),
            constraint: options.constraints.next(),
            counts: HashMap::new(),
            changed: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(options.seed),
        }
    }

    /// Whether a grammar or the like limits what it samples.
    pub fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// The id of the next token; of equal logits the lowest id. No pass sorts the vocabulary.
    ///
    /// # Errors
    /// A constraint that fails, or that allows no token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let mut changed = std::mem::take(&mut self.changed);
        let drawn = self.change(logits, &mut changed).map(|logits| self.draw(logits));
        self.changed = changed;
        let id = drawn?;
        if !self.penalties.are_off() {
            *self.counts.entry(id).or_default() += 1;
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(id)?;
        }
        Ok(id)
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        if self.temperature <= 0.0 || logits.is_empty() {
            return likeliest(logits);
        }
        self.choice.draw(logits, self.temperature, self.rng.random())
    }

    /// The logits, or `buffer` with what penalties, biases and the constraint make of them.
    fn change<'a>(&mut self, logits: &'a [f32], buffer: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        if self.counts.is_empty() && self.bias.is_empty() && self.constraint.is_none() {
            return Ok(logits);
        }
        buffer.clear();
        buffer.extend_from_slice(logits);
        for (&id, &count) in &self.counts {
            if let Some(logit) = buffer.get_mut(id as usize) {
                *logit = self.penalties.of(*logit, count);
            }
        }
        for &(id, bias) in &self.bias {
            if let Some(logit) = buffer.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(buffer)?;
            if buffer.iter().all(|&logit| logit == f32::NEG_INFINITY) {
                let what = "the constraint of the output allows no token of the vocabulary";
                return Err(ModelError::Invalid(what.into()));
            }
        }
        Ok(buffer)
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
        assert_eq!(sampler(0.0, 1.0, 0, 0).sample(&LOGITS).unwrap(), 1);
    }

    #[test]
    fn the_likeliest_is_found_in_any_block() {
        let mut logits = vec![0.0; 5000];
        assert_eq!((likeliest(&logits), likeliest(&[]), any_nan(&logits)), (0, 0, false));
        for at in [0, 1023, 1024, 3000, 4999] {
            logits[at] = 2.0 + at as f32;
            assert_eq!(likeliest(&logits), at as u32);
        }
        logits[4000] = logits[4999];
        assert_eq!(likeliest(&logits), 4000);
        for at in [4998, 1500, 7] {
            logits[at] = f32::NAN;
            assert_eq!((likeliest(&logits), any_nan(&logits)), (at as u32, true));
        }
        assert_eq!(likeliest(&vec![f32::NEG_INFINITY; 3000]), 0);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let draw = |seed| -> Vec<u32> {
            let mut sampler = sampler(1.0, 1.0, 0, seed);
            (0..50).map(|_| sampler.sample(&LOGITS).unwrap()).collect()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let mut narrow = sampler(1.0, 1.0, 2, 1);
        let mut nucleus = sampler(1.0, 0.6, 0, 1);
        for _ in 0..200 {
            assert!([1, 2].contains(&narrow.sample(&LOGITS).unwrap()));
            assert!([1, 2].contains(&nucleus.sample(&LOGITS).unwrap()));
        }
        assert_eq!(sampler(1.0, 0.0, 0, 1).sample(&LOGITS).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let mut sampler = sampler(1.0, 1.0, 0, 3);
        let hits = (0..4000).filter(|_| sampler.sample(&[0.0, 1.0]).unwrap() == 1).count();
        let expected = 1.0_f64.exp() / (1.0 + 1.0_f64.exp());
        assert!((hits as f64 / 4000.0 - expected).abs() < 0.03);
    }

    #[test]
    fn penalties_count_what_was_sampled() {
        let options = GenerateOptions { repetition_penalty: 2.0, ..Default::default() };
        let mut sampler = Sampler::new(&options);
        let drawn: Vec<u32> = (0..5).map(|_| sampler.sample(&LOGITS).unwrap()).collect();
        // 3, 3 and 1 become 1.5, 1.5 and 0.5.
        assert_eq!(drawn, [1, 2, 1, 1, 1]);
        let options = GenerateOptions { frequency_penalty: 1.5, ..Default::default() };
        let mut sampler = Sampler::new(&options);
        let drawn: Vec<u32> = (0..5).map(|_| sampler.sample(&LOGITS).unwrap()).collect();
        assert_eq!(drawn, [1, 2, 1, 2, 0]);
        let options = GenerateOptions { presence_penalty: 2.5, ..Default::default() };
        let mut sampler = Sampler::new(&options);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.sample(&LOGITS).unwrap()).collect();
        assert_eq!(drawn, [1, 2, 0, 1]);
    }

    #[test]
    fn a_bias_is_added_to_the_logit_of_its_token() {
        let with = |logit_bias| GenerateOptions { logit_bias, ..Default::default() };
        let drawn = |bias| Sampler::new(&with(bias)).sample(&LOGITS).unwrap();
        assert_eq!(drawn(vec![(0, 1.9)]), 1);
        assert_eq!(drawn(vec![(0, 2.1)]), 0);
        assert_eq!(drawn(vec![(1, -100.0), (2, -100.0)]), 0);
        // Ids that a model does not have are looked at by `validate`'s callers.
        assert_eq!(drawn(vec![(9, 100.0)]), 1);
    }

    /// Allows ids in turn.
    #[derive(Debug)]
    struct Turns(Vec<Vec<u32>>, Vec<u32>);

    impl Constraint for Turns {
        fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
            let allowed = self.0.get(self.1.len()).cloned().unwrap_or_default();
            for (id, logit) in logits.iter_mut().enumerate() {
                if !allowed.contains(&(id as u32)) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            Ok(())
        }

        fn accept(&mut self, id: u32) -> Result<()> {
            self.1.push(id);
            Ok(())
        }
    }

    #[test]
    fn a_constraint_decides_what_is_drawn_and_sees_every_token() {
        for (temperature, top_k, top_p, min_p) in
            [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (2.0, 2, 0.5, 0.0), (1.0, 3, 1.0, 0.9)]
        {
            let turns = || Turns(vec![vec![0, 3], vec![3], vec![2], vec![]], Vec::new());
            let constraints = Constraints::new(move || Box::new(turns()));
            let options = GenerateOptions {
                temperature,
                top_k,
                top_p,
                min_p,
                constraints,
                ..Default::default()
            };
            // Every sampler begins anew.
            for _ in 0..2 {
                let mut sampler = Sampler::new(&options);
                assert!([0, 3].contains(&sampler.sample(&LOGITS).unwrap()));
                assert_eq!(sampler.sample(&LOGITS).unwrap(), 3);
                assert_eq!(sampler.sample(&LOGITS).unwrap(), 2);
                let error = sampler.sample(&LOGITS).unwrap_err();
                assert!(error.to_string().contains("allows no token"), "{error}");
            }
        }
    }
}
