//! What a student's layer has in place of softmax attention.

use candle_core::Tensor;
use still_attention::{HybridConfig, HybridWeights};

use super::linear::LoraLayer;

/// The learned part of one layer.
#[derive(Clone, Debug)]
pub struct StudentLayer {
    /// The layer's attention.
    pub config: HybridConfig,
    /// Feature maps, `ℓ` and `w`.
    pub attention: HybridWeights,
    /// `W_g` `[H·D, E]`, with `config.gate`.
    pub gate_proj: Option<Tensor>,
    /// Unmerged low-rank updates.
    pub lora: Option<LoraLayer>,
}
