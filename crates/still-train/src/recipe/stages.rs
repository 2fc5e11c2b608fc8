//! `[transfer]` and `[finetune]`: the two stages.

use serde::{Deserialize, Serialize};
use still_model::{LoraConfig, LoraTarget};

use crate::optimizer::AdamWConfig;

/// Stage 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransferRecipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// The optimizer.
    pub optimizer: AdamWConfig,
}

impl Default for TransferRecipe {
    fn default() -> Self {
        Self { steps: 24, batch: 1, optimizer: AdamWConfig { lr: 3e-2, ..AdamWConfig::default() } }
    }
}

/// What stage 2 minimises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// KL divergence of the student's next-token distribution from the teacher's.
    #[default]
    LogitKl,
    /// Cross-entropy of the next token (the paper).
    CrossEntropy,
}

/// Stage 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneRecipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// `"logit_kl"` or `"cross_entropy"`.
    pub objective: Objective,
    /// Also train feature maps, `ℓ`, `w` and gate.
    pub train_attention: bool,
    /// Compute each layer again in the backward pass: memory then does not grow with depth × length.
    pub recompute: bool,
    /// The low-rank updates.
    pub lora: LoraConfig,
    /// The optimizer.
    pub optimizer: AdamWConfig,
}

impl Default for FinetuneRecipe {
    fn default() -> Self {
        Self {
            steps: 12,
            batch: 1,
            objective: Objective::default(),
            train_attention: true,
            recompute: true,
            lora: LoraConfig { rank: 8, alpha: 16.0, targets: LoraTarget::ALL.to_vec() },
            optimizer: AdamWConfig { lr: 3e-3, ..AdamWConfig::default() },
        }
    }
}
