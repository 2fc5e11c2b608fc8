//! RoPE's frequencies, scaled as the configuration says.

use crate::config::{ModelConfig, RopeScaling};

/// What turns positions into angles.
#[derive(Clone, Debug)]
pub struct Frequencies {
    /// Radians per position of each channel pair that is rotated, `[rotary_dim / 2]`.
    pub inverse: Vec<f64>,
    /// What rotated channels are multiplied by.
    pub scale: f64,
}

impl Frequencies {
    /// The frequencies of a model, those of its layers with full attention.
    pub fn new(config: &ModelConfig) -> Self {
        let inverse = by_base(config.rope_theta, config.rotary_dim())
            .enumerate()
            .map(|(i, frequency)| scaled(config.rope_scaling.as_ref(), i, frequency))
            .collect();
        let scale = match config.rope_scaling {
            Some(RopeScaling::LongRope { attention_factor, .. }) => attention_factor,
            _ => 1.0,
        };
        Self { inverse, scale }
    }

    /// Radians at a position, `[rotary_dim / 2]`.
    pub fn angles(&self, position: usize) -> impl Iterator<Item = f64> {
        self.inverse.iter().map(move |frequency| position as f64 * frequency)
    }

    /// Those of its layers with a sliding window, if it has such.
    pub fn local(config: &ModelConfig) -> Option<Self> {
        let sliding = config.sliding.as_ref()?;
        let inverse = by_base(sliding.rope_theta, config.rotary_dim()).collect();
        Some(Self { inverse, scale: 1.0 })
    }
}

/// `theta^(−2i / d)`
fn by_base(theta: f64, d: usize) -> impl Iterator<Item = f64> {
    (0..d / 2).map(move |i| theta.powf(-2.0 * i as f64 / d as f64))
}

/// The frequency of channel pair `i`.
fn scaled(scaling: Option<&RopeScaling>, i: usize, frequency: f64) -> f64 {
    match scaling {
        None => frequency,
        Some(RopeScaling::Linear { factor }) => frequency / factor,
        Some(RopeScaling::Factors(factors)) => frequency / factors[i],
        Some(RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings,
            declared_length,
            ..
        }) => {
            let long = declared_length > original_max_position_embeddings;
            frequency / if long { long_factor[i] } else { short_factor[i] }
        }
        Some(&RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => {
            // Rotations that this pair makes over the original context decide.
            let wavelength = std::f64::consts::TAU / frequency;
            let rotations = original_max_position_embeddings as f64 / wavelength;
            let ramp = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let keep = ramp.clamp(0.0, 1.0);
            frequency * (keep + (1.0 - keep) / factor)
        }
    }
}
