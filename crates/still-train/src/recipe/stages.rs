//! `[transfer]` and `[finetune]`: the two stages.

use serde::{Deserialize, Serialize};
use still_model::{LoraConfig, LoraTarget};

use crate::optimizer::AdamWConfig;

/// What stage 1 compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferLoss {
    /// The attention's output of each head, before `o_proj`.
    #[default]
    HeadMse,
    /// The attention's output after `o_proj`: errors count as much as the layer after sees of them.
    OutputMse,
}

/// What becomes of the layers' losses in the one that stage 1 minimizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Their sum: a layer's gradient does not depend on how many others there are.
    #[default]
    Sum,
    /// Their mean.
    Mean,
}

/// Stage 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransferRecipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// `"head_mse"` or `"output_mse"`.
    pub loss: TransferLoss,
    /// Divide each layer's loss by the variance of its target, so that no layer outweighs the others by its scale.
    pub normalise: bool,
    /// `"sum"` or `"mean"` over the layers.
    pub reduction: Reduction,
    /// Factor of the loss and so of every gradient. AdamW divides it out again but for its `eps`; it matters to `clip`. Reported
    /// losses are without it.
    pub loss_scale: f64,
    /// Weight of one more loss: that of the linear branch alone (its token and the linear state, no window, nothing
    /// salient) against the same target, so that the branch is not ignored. 0: none.
    pub linear_branch_weight: f64,
    /// The optimizer.
    pub optimizer: AdamWConfig,
}

impl Default for TransferRecipe {
    fn default() -> Self {
        Self {
            steps: 48,
            batch: 1,
            loss: TransferLoss::default(),
            normalise: false,
            reduction: Reduction::default(),
            loss_scale: 1.0,
            linear_branch_weight: 0.0,
            optimizer: AdamWConfig { lr: 3e-2, ..AdamWConfig::default() },
        }
    }
}

impl TransferRecipe {
    /// By which the gradients of each of `layers` layers' own losses are multiplied.
    pub(crate) fn gradient_scale(&self, layers: usize) -> f64 {
        match self.reduction {
            Reduction::Sum => self.loss_scale,
            Reduction::Mean => self.loss_scale / layers.max(1) as f64,
        }
    }
}

/// What stage 2 minimizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// KL divergence of the student's next-token distribution from the teacher's.
    #[default]
    LogitKl,
    /// Cross-entropy of the next token (the paper).
    CrossEntropy,
    /// `kl` times the one plus `1 − kl` times the other.
    Mixed {
        /// Weight of the divergence, 0 … 1.
        kl: f64,
    },
}

/// What stage 2 computes again on its way back, instead of keeping it: memory for time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RecomputeSpelled", into = "RecomputeSpelled")]
pub enum Recompute {
    /// Each layer from its input: memory does not grow with depth × length.
    #[default]
    Layer,
    /// The MLP's two wide activations of each layer, which are most of what it keeps.
    Mlp,
    /// Nothing.
    Nothing,
}

/// [`Recompute`] as recipes spell it: `true` and `false`, or by name.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RecomputeSpelled {
    Flag(bool),
    Name(RecomputeName),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RecomputeName {
    Layer,
    Mlp,
    Nothing,
}

impl From<RecomputeSpelled> for Recompute {
    fn from(spelled: RecomputeSpelled) -> Self {
        match spelled {
            RecomputeSpelled::Flag(true) | RecomputeSpelled::Name(RecomputeName::Layer) => {
                Self::Layer
            }
            RecomputeSpelled::Name(RecomputeName::Mlp) => Self::Mlp,
            RecomputeSpelled::Flag(false) | RecomputeSpelled::Name(RecomputeName::Nothing) => {
                Self::Nothing
            }
        }
    }
}

impl From<Recompute> for RecomputeSpelled {
    fn from(recompute: Recompute) -> Self {
        match recompute {
            Recompute::Layer => Self::Flag(true),
            Recompute::Mlp => Self::Name(RecomputeName::Mlp),
            Recompute::Nothing => Self::Flag(false),
        }
    }
}

/// Stage 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneRecipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// `"logit_kl"`, `"cross_entropy"` or `{ mixed = { kl = 0.5 } }`.
    pub objective: Objective,
    /// Also train feature maps, `ℓ`, `w` and gate.
    pub train_attention: bool,
    /// What the backward pass computes again: `true` (or `"layer"`), `"mlp"`, `false` (or `"nothing"`).
    pub recompute: Recompute,
    /// The low-rank updates.
    pub lora: LoraConfig,
    /// Share of the updates' inputs that each step leaves out, 0 … 1 (below 1).
    pub dropout: f64,
    /// The optimizer.
    pub optimizer: AdamWConfig,
}

impl Default for FinetuneRecipe {
    fn default() -> Self {
        Self {
            steps: 48,
            batch: 1,
            objective: Objective::default(),
            train_attention: true,
            recompute: Recompute::Layer,
            lora: LoraConfig { rank: 8, alpha: 16.0, targets: LoraTarget::ALL.to_vec() },
            dropout: 0.0,
            optimizer: AdamWConfig { lr: 3e-3, ..AdamWConfig::default() },
        }
    }
}
