//! Seeded random numbers, alike on every platform.

use candle_core::{Device, Result, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// A uniform number in [0, 1): a hash of a seed and the three words that say what it is for. It does not depend on what
/// was drawn before, so that work can be cut anywhere.
pub fn uniform(seed: u64, words: [usize; 3]) -> f64 {
    let hash = |state: u64, word: usize| {
        split_mix(state ^ (word as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    };
    (words.into_iter().fold(seed, hash) >> 11) as f64 / (1_u64 << 53) as f64
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A tensor of normal values of mean 0 and a standard deviation, f32 on the CPU (Box and Muller).
///
/// # Errors
/// An error of the tensor library.
pub fn normal(rng: &mut ChaCha8Rng, shape: &[usize], deviation: f64) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            let (u, v): (f64, f64) = (rng.random_range(f64::EPSILON..1.0), rng.random());
            (deviation * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn numbers_are_those_of_their_seed_and_words() {
        let numbers: Vec<f64> = (0..1000).map(|i| uniform(7, [0, 1, i])).collect();
        assert!(numbers.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
        assert_eq!(numbers[3], uniform(7, [0, 1, 3]));
        assert_ne!(numbers[3], uniform(7, [1, 0, 3]));
        assert_ne!(numbers[3], uniform(8, [0, 1, 3]));
    }

    #[test]
    fn normal_values_have_their_deviation() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let values = normal(&mut rng, &[100, 100], 0.5).unwrap();
        let square = values.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((square.sqrt() - 0.5).abs() < 0.02, "{square}");
        assert_eq!(values.dims(), [100, 100]);
    }
}
