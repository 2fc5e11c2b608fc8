//! The sampler's twin: every step as its definition says, in float64, over a sorted vocabulary.

use std::collections::HashMap;

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Choice, Sampler};
use crate::generate::GenerateOptions;

/// The probability of every token.
fn probabilities(
    logits: &[f32],
    counts: &HashMap<u32, u32>,
    options: &GenerateOptions,
) -> Vec<f64> {
    let mut logits = logits.to_vec();
    // In float32, as logits are: otherwise tokens that are equal would come in another order.
    for (&id, &count) in counts {
        let logit = &mut logits[id as usize];
        let repetition = options.repetition_penalty as f32;
        *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        *logit -= options.presence_penalty as f32;
        *logit -= options.frequency_penalty as f32 * count as f32;
    }
    for &(id, bias) in &options.logit_bias {
        logits[id as usize] += bias;
    }
    let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
    let softmax = |order: &[usize]| -> Vec<f64> {
        let max = order.iter().map(|&id| logits[id]).fold(f64::NEG_INFINITY, f64::max);
        let exp = |&id: &usize| ((logits[id] - max) / options.temperature).exp();
        let total: f64 = order.iter().map(exp).sum();
        order.iter().map(|id| exp(id) / total).collect()
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let (p, mut sum, mut kept) = (softmax(&order), 0.0, 0);
    while kept < order.len() && (kept == 0 || sum < options.top_p) {
        sum += p[kept];
        kept += 1;
    }
    order.truncate(kept);
    let p = softmax(&order);
    order.truncate(p.iter().take_while(|&&p_of| p_of >= options.min_p * p[0]).count());
    let mut all = vec![0.0; logits.len()];
    for (&id, p) in order.iter().zip(softmax(&order)) {
        all[id] = p;
    }
    all
}

/// The same of the sampler.
fn fast(logits: &[f32], counts: &HashMap<u32, u32>, options: &GenerateOptions) -> Vec<f64> {
    let mut sampler = Sampler::new(options);
    sampler.counts.clone_from(counts);
    let mut buffer = Vec::new();
    let logits = sampler.change(logits, &mut buffer).unwrap();
    let mut choice = Choice::new(options.top_k, options.top_p, options.min_p);
    let mut all = vec![0.0; logits.len()];
    for (id, weight) in choice.of(logits, options.temperature) {
        all[id as usize] = weight;
    }
    let total: f64 = all.iter().sum();
    all.into_iter().map(|weight| weight / total).collect()
}

/// The sum of differences; infinite if a token is in one set alone. The sampler's weights are float32, which end at 1e-38.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let pairs = || a.iter().zip(b);
    let out = |p: f64| p < 1e-30;
    match pairs().all(|(a, b)| out(*a) == out(*b)) {
        true => pairs().map(|(a, b)| (a - b).abs()).sum(),
        false => f64::INFINITY,
    }
}

fn options() -> impl Strategy<Value = GenerateOptions> {
    let off_or = |values: std::ops::Range<f64>, off: f64| prop_oneof![Just(off), values];
    let numbers = (0.2..3.0, off_or(0.05..1.0, 1.0), off_or(0.0..0.5, 0.0));
    let penalties = (off_or(0.8..1.5, 1.0), off_or(-1.0..1.0, 0.0), off_or(-0.5..0.5, 0.0));
    (numbers, penalties, prop_oneof![Just(0), 1..40_usize, 1..2000_usize]).prop_map(
        |((temperature, top_p, min_p), (repetition, presence, frequency), top_k)| GenerateOptions {
            temperature,
            top_p,
            min_p,
            top_k,
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            ..GenerateOptions::default()
        },
    )
}

/// Logits, spread by `spread`, of which some are equal.
fn logits(count: usize, spread: f32, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let one = |rng: &mut ChaCha8Rng| -> f32 {
        let sum: f32 = (0..6).map(|_| rng.random::<f32>() - 0.5).sum();
        match rng.random_range(0..8) {
            0 => (sum * spread).round(),
            _ => sum * spread,
        }
    };
    (0..count).map(|_| one(&mut rng)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn every_token_has_its_probability(
        options in options(),
        count in prop_oneof![1..8_usize, 60..70_usize, 1000..3000_usize],
        spread in 0.1_f32..10.0,
        seed in any::<u64>(),
        seen in proptest::collection::hash_map(0..3000_u32, 1..4_u32, 0..20),
        bias in proptest::collection::hash_map(0..3000_u32, -20.0_f32..20.0, 0..5),
    ) {
        let logits = logits(count, spread, seed);
        let bias: HashMap<u32, f32> =
            bias.into_iter().map(|(id, bias)| (id % count as u32, bias)).collect();
        let options = GenerateOptions { logit_bias: bias.into_iter().collect(), ..options };
        let seen: HashMap<u32, u32> =
            seen.into_iter().map(|(id, times)| (id % count as u32, times)).collect();
        let found = fast(&logits, &seen, &options);
        // Rounding may move the last token over the edge of a set.
        let distances = [0.0, 1e-5, -1e-5].map(|slack| {
            let (top_p, min_p) = (options.top_p * (1.0 + slack), options.min_p * (1.0 - slack));
            let moved = GenerateOptions { top_p, min_p, ..options.clone() };
            distance(&probabilities(&logits, &seen, &moved), &found)
        });
        prop_assert!(distances.iter().any(|far| *far < 1e-4), "{distances:?}");
    }
}

/// Drawn as often as likely: Pearson's χ² of 40,000 draws over some tens of tokens.
#[test]
fn draws_follow_the_probabilities() {
    const DRAWS: usize = 40_000;
    let logits = logits(400, 3.0, 5);
    for (top_k, top_p, min_p) in
        [(0, 1.0, 0.0), (30, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (50, 0.9, 0.05)]
    {
        let options = GenerateOptions {
            temperature: 1.3,
            top_k,
            top_p,
            min_p,
            seed: 11,
            ..Default::default()
        };
        let expected = probabilities(&logits, &HashMap::new(), &options);
        let mut sampler = Sampler::new(&options);
        let mut drawn = vec![0_usize; logits.len()];
        for _ in 0..DRAWS {
            drawn[sampler.sample(&logits).unwrap() as usize] += 1;
        }
        // Tokens that come seldom are counted together.
        let (mut squares, mut cells, mut rest) = (0.0, 0, (0.0, 0));
        let mut add = |p: f64, times: usize| {
            let mean = p * DRAWS as f64;
            squares += (times as f64 - mean).powi(2) / mean;
            cells += 1;
        };
        for (&p, &times) in expected.iter().zip(&drawn) {
            assert!(p > 0.0 || times == 0, "a token was drawn that cannot be");
            match p * DRAWS as f64 >= 10.0 {
                true => add(p, times),
                false => rest = (rest.0 + p, rest.1 + times),
            }
        }
        if rest.0 > 0.0 {
            add(rest.0, rest.1);
        }
        // Mean and deviation of χ² with `cells` − 1 degrees of freedom.
        let freedom = f64::from(cells) - 1.0;
        let sigmas = (squares - freedom) / (2.0 * freedom).sqrt();
        assert!(cells > 5 && sigmas.abs() < 4.0, "{sigmas} sigmas, {cells} cells: {options:?}");
    }
}

#[test]
fn extreme_temperatures_are_no_nan() {
    let logits = [1.0, 5.0, 5.0, -3.0];
    let seen = HashMap::new();
    for temperature in [1e-300, 1e-30, 1e6] {
        let options = GenerateOptions { temperature, ..Default::default() };
        let (expected, found) =
            (probabilities(&logits, &seen, &options), fast(&logits, &seen, &options));
        for (a, b) in expected.iter().zip(&found) {
            assert!((a - b).abs() < 1e-6, "{expected:?} {found:?}");
        }
    }
}
