//! RoPE's frequencies, scaled as the configuration says.

use crate::config::{ModelConfig, RopeScaling};

/// Radians per position of each channel pair, `[D/2]`.
pub fn inverse_frequencies(config: &ModelConfig) -> Vec<f64> {
    let d = config.head_dim;
    (0..d / 2)
        .map(|i| (i, config.rope_theta.powf(-2.0 * i as f64 / d as f64)))
        .map(|(i, frequency)| match &config.rope_scaling {
            None => frequency,
            Some(RopeScaling::Linear { factor }) => frequency / factor,
            Some(RopeScaling::Factors(factors)) => frequency / factors[i],
            &Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                // Turns that this pair makes over the original context decide.
                let wavelength = std::f64::consts::TAU / frequency;
                let turns = original_max_position_embeddings as f64 / wavelength;
                let ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let keep = ramp.clamp(0.0, 1.0);
                frequency * (keep + (1.0 - keep) / factor)
            }
        })
        .collect()
}
