//! The configuration of a base model: everything but its weights.
//!
//! | file | content |
//! |---|---|
//! | `family` | what sets families apart, as data |
//! | `hugging_face` | `config.json`, both ways |
//! | `rope` | RoPE's parameters |
//! | `window` | sliding windows |
//! | `refused` | keys that would change what is computed, and are not |
//! | `read` | JSON values by type and range |

mod family;
mod hugging_face;
mod read;
mod refused;
mod rope;
mod window;

use std::fmt::Display;
use std::ops::RangeInclusive;

use candle_core::DeviceLocation;
use still_attention::{HeadGeometry, RowDtype, StillConfig};

pub use family::{Activation, Architecture};
pub(crate) use family::{Biased, WindowKey};
pub(crate) use read::Table;
pub use rope::RopeScaling;
pub(crate) use window::pattern as window_pattern;

use crate::error::{ModelError, Result};

const HIDDEN_SIZE: RangeInclusive<usize> = 1..=1 << 20;
const INTERMEDIATE_SIZE: RangeInclusive<usize> = 1..=1 << 22;
const LAYERS: RangeInclusive<usize> = 1..=1 << 12;
const HEADS: RangeInclusive<usize> = 1..=1 << 14;
const HEAD_DIM: RangeInclusive<usize> = 2..=1 << 12;
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
/// The longest context of a configuration, in tokens.
const MAX_POSITIONS: usize = u32::MAX as usize;
const RMS_NORM_EPS: RangeInclusive<f64> = 1e-20..=1.0;
const ROPE_THETA: RangeInclusive<f64> = 1.0..=1e15;
const ROTARY_FACTOR: RangeInclusive<f64> = 1e-3..=1.0;
const QUERY_SCALAR: RangeInclusive<f64> = 1e-3..=1e9;

/// A decoder's hyper-parameters, in Hugging Face's words.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are Hugging Face's own")]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    /// Share of each head's channels that RoPE rotates, from the first on.
    pub partial_rotary_factor: f64,
    /// Logits are divided by the root of it, and of the head's channels if it is absent.
    pub query_pre_attn_scalar: Option<f64>,
    /// Layers with a sliding window, in families that have such: linearizing leaves them as they are.
    pub sliding: Option<SlidingAttention>,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases on the q, k and v projections.
    pub attention_bias: bool,
    /// A bias on the o projection. In Hugging Face's files it comes with the others; a GGUF file may have either.
    pub attention_output_bias: bool,
    /// Biases on the MLP's three projections.
    pub mlp_bias: bool,
    pub bos_token_id: Option<u32>,
    /// Any of these ends generation.
    pub eos_token_ids: Vec<u32>,
}

/// Layers that attend to a window of the last tokens alone.
#[derive(Clone, Debug, PartialEq)]
pub struct SlidingAttention {
    /// Tokens that are attended to, the token itself among them.
    pub window: usize,
    /// Which layers do, bottom first.
    pub layers: Vec<bool>,
    /// The base of their rotation, which is not scaled.
    pub rope_theta: f64,
}

impl ModelConfig {
    /// Head counts for the operator.
    pub fn geometry(&self) -> HeadGeometry {
        HeadGeometry {
            num_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// Tokens that a layer attends to, the token itself among them; `None`: all that came before.
    pub fn sliding_window(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding.as_ref()?;
        sliding.layers.get(layer).is_some_and(|&slides| slides).then_some(sliding.window)
    }

    /// Layers with full attention, which a student's replaces, bottom first.
    pub fn full_layers(&self) -> impl Iterator<Item = usize> {
        (0..self.num_hidden_layers).filter(|&layer| self.sliding_window(layer).is_none())
    }

    /// Checks that the device has kernels for the family and for the scale of its logits.
    pub(crate) fn check_device(&self, place: DeviceLocation) -> Result<()> {
        let family = self.architecture.family();
        let missing = match (family.missing_on_cuda, self.query_pre_attn_scalar) {
            _ if place == DeviceLocation::Cpu => return Ok(()),
            (None, None) => return Ok(()),
            (None, Some(scalar)) => format!("queries scaled by the root of {scalar}"),
            (Some(missing), _) => missing.to_owned(),
        };
        Err(ModelError::Unsupported {
            what: format!(
                "a {} model on CUDA (no kernels for {missing})",
                self.architecture.model_type()
            ),
            found_in: None,
            hint: "run it on the CPU: --device cpu".into(),
        })
    }

    /// The factor of `q·k` in logits, if it is not `1/√D`.
    pub fn logit_scale(&self) -> Option<f64> {
        self.query_pre_attn_scalar.map(|scalar| scalar.powf(-0.5))
    }

    /// A student's attention as this model has it: with the model's scale of logits, in the layers that it replaces (the others
    /// keep theirs to a sliding window).
    #[must_use]
    pub fn fit_still(&self, still: StillConfig) -> StillConfig {
        let logit_scale = self.logit_scale();
        StillConfig { logit_scale, ..still }.in_layers(self.full_layers())
    }

    /// Checks a student's attention against the model: every layer with full attention has budgets, no other has, and logits are
    /// scaled as the model's are.
    ///
    /// # Errors
    /// Names the layer and the value that does not fit.
    pub fn check_still(&self, still: &StillConfig) -> still_attention::Result<()> {
        let usual = (self.head_dim as f64).powf(-0.5);
        let [own, given] = [self.logit_scale(), still.logit_scale].map(|s| s.unwrap_or(usual));
        // JSON is read back to the last digit but one.
        if (given / own - 1.0).abs() > 1e-9 || given.is_nan() {
            return Err(still_attention::AttentionError::Config(format!(
                "logit_scale is {given}, but the model multiplies its logits by {own}"
            )));
        }
        still.validate_in(self.num_hidden_layers, self.full_layers(), self.geometry())
    }

    /// The factor of embeddings.
    pub(crate) fn embedding_scale(&self) -> Option<f64> {
        let scaled = self.architecture.family().scaled_embeddings;
        scaled.then(|| (self.hidden_size as f64).sqrt())
    }

    /// Bytes of a dense cache of one sequence of so many tokens; a sliding window holds no more than its own.
    pub fn dense_cache_bytes(&self, tokens: usize, rows: RowDtype) -> u64 {
        let held = |layer| self.sliding_window(layer).unwrap_or(tokens).min(tokens) as u64;
        let row = 2 * self.num_key_value_heads * rows.row_bytes(self.head_dim);
        let held = (0..self.num_hidden_layers).map(held).fold(0, u64::saturating_add);
        held.saturating_mul(row as u64)
    }

    /// Channels of each head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// Checks that the numbers are in range and fit each other. Within these ranges no product of sizes overflows.
    ///
    /// # Errors
    /// Names the values that do not.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("hidden_size", self.hidden_size, HIDDEN_SIZE),
            ("intermediate_size", self.intermediate_size, INTERMEDIATE_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, LAYERS),
            ("num_attention_heads", self.num_attention_heads, HEADS),
            ("num_key_value_heads", self.num_key_value_heads, HEADS),
            ("head_dim", self.head_dim, HEAD_DIM),
            ("vocab_size", self.vocab_size, VOCABULARY),
            ("max_position_embeddings", self.max_position_embeddings, 1..=MAX_POSITIONS),
        ] {
            in_range(name, value, &range)?;
        }
        in_range("rms_norm_eps", self.rms_norm_eps, &RMS_NORM_EPS)?;
        in_range("rope_theta", self.rope_theta, &ROPE_THETA)?;
        in_range("partial_rotary_factor", self.partial_rotary_factor, &ROTARY_FACTOR)?;
        let scalar = self.query_pre_attn_scalar.unwrap_or(self.head_dim as f64);
        in_range("query_pre_attn_scalar", scalar, &QUERY_SCALAR)?;
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv_heads != 0 {
            return Err(ModelError::Invalid(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::Invalid(format!(
                "head_dim {} is not even: RoPE rotates pairs of channels",
                self.head_dim
            )));
        }
        let rotated = self.rotary_dim();
        if rotated < 2 || !rotated.is_multiple_of(2) {
            return Err(ModelError::Invalid(format!(
                "partial_rotary_factor {} of a head_dim of {} is {rotated} channels: RoPE rotates pairs",
                self.partial_rotary_factor, self.head_dim
            )));
        }
        if let Some(sliding) = &self.sliding {
            in_range("sliding_window", sliding.window, &(1..=MAX_POSITIONS))?;
            in_range("rope_theta of sliding layers", sliding.rope_theta, &ROPE_THETA)?;
            if sliding.layers.len() != self.num_hidden_layers {
                return Err(ModelError::Invalid(format!(
                    "{} layers with or without a sliding window, \"num_hidden_layers\" is {}",
                    sliding.layers.len(),
                    self.num_hidden_layers
                )));
            }
        }
        self.rope_scaling.as_ref().map_or(Ok(()), |scaling| scaling.validate(rotated))
    }
}

fn in_range<T: Display + PartialOrd>(
    name: &str,
    value: T,
    range: &RangeInclusive<T>,
) -> Result<()> {
    // A NaN is in no range.
    if range.contains(&value) {
        return Ok(());
    }
    Err(ModelError::Invalid(format!(
        "{name} is {value}, expected a number from {} to {}",
        range.start(),
        range.end()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{tiny_config, tiny_sliding_config};

    /// A place needs no GPU to be spoken of.
    #[test]
    fn a_family_without_cuda_kernels_is_refused_by_name() {
        let cuda = DeviceLocation::Cuda { gpu_id: 0 };
        for config in [tiny_config(), tiny_sliding_config()] {
            config.check_device(DeviceLocation::Cpu).unwrap();
        }
        tiny_config().check_device(cuda).unwrap();
        let refused = tiny_sliding_config().check_device(cuda).unwrap_err();
        let told = refused.to_string();
        assert!(
            told.contains("a gemma3_text model on CUDA") && told.contains("sliding windows"),
            "{told}"
        );
        assert_eq!(refused.hint(), Some("run it on the CPU: --device cpu".into()));
        let gemma = ModelConfig { architecture: Architecture::Gemma, ..tiny_config() };
        let told = gemma.check_device(cuda).unwrap_err().to_string();
        assert!(told.contains("a gemma model on CUDA (no kernels for GELU)"), "{told}");
        let scaled = ModelConfig { query_pre_attn_scalar: Some(168.0), ..tiny_config() };
        scaled.check_device(DeviceLocation::Cpu).unwrap();
        let told = scaled.check_device(cuda).unwrap_err().to_string();
        assert!(told.contains("queries scaled by the root of 168"), "{told}");
    }
}
