//! `[attention]`: the student's operator.

use serde::{Deserialize, Serialize};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, LinearNorm, Mode, Router, RowDtype, SelectionHead,
    StillConfig,
};
use still_model::{FeatureInit, ModelConfig};

use crate::error::Result;

/// The hybrid attention of every layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionRecipe {
    /// `"hybrid"` or `"linear_only"`.
    pub mode: Mode,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Salient tokens of each chunk, the same everywhere.
    pub budget: usize,
    /// `[layer][selection head]`; takes the place of `budget`. The list of a layer with a sliding window is empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budgets: Option<Vec<Vec<usize>>>,
    /// Most salient tokens per selection head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap: Option<usize>,
    /// By its name, such as `"self_saliency"`; with its options, such as `{ random = { seed = 0 } }`.
    pub router: Router,
    /// `"kv_head"` or `"query_head"`.
    pub selection_head: SelectionHead,
    /// By its name, such as `"softmax"`; with its options, such as `{ np_map = { householder = false } }`.
    pub feature_map: FeatureMap,
    /// Columns of a feature map's matrix; the head dimension if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feature_dim: Option<usize>,
    /// `"identity"` or `"normal"`.
    pub init: FeatureInit,
    /// `"mean"` or `"sum"`.
    pub linear_norm: LinearNorm,
    /// Output gate on the linear branch.
    pub gate: bool,
    /// Exact terms are multiplied by a learned factor per query head (LoLCATs).
    pub window_factor: bool,
    /// Branch switches.
    pub branches: Branches,
    /// How exact rows are stored where the student is used, and counted in calibration: `"bf16"`, `"int8"` or `"int4"`; as each
    /// command does if absent. Training computes with plain rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowDtype>,
}

impl Default for AttentionRecipe {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            chunk: 64,
            budget: 4,
            budgets: None,
            cap: None,
            router: Router::default(),
            selection_head: SelectionHead::default(),
            feature_map: FeatureMap::default(),
            feature_dim: None,
            init: FeatureInit::default(),
            linear_norm: LinearNorm::default(),
            gate: false,
            window_factor: false,
            branches: Branches::default(),
            rows: None,
        }
    }
}

impl AttentionRecipe {
    /// The student's configuration for a model.
    ///
    /// # Errors
    /// Budgets that do not fit the model.
    pub fn resolve(&self, model: &ModelConfig) -> Result<StillConfig> {
        let geometry: HeadGeometry = model.geometry();
        let heads = geometry.selection_heads(self.selection_head);
        let of_layer = |n| match model.sliding_window(n) {
            Some(_) => Vec::new(),
            None => vec![self.budget; heads],
        };
        let uniform = || (0..model.num_hidden_layers).map(of_layer).collect();
        let config = StillConfig {
            mode: self.mode,
            chunk: self.chunk,
            router: self.router,
            selection_head: self.selection_head,
            budgets: self.budgets.clone().unwrap_or_else(uniform),
            cap: self.cap,
            feature_map: self.feature_map,
            feature_dim: self.feature_dim.unwrap_or(model.head_dim),
            linear_norm: self.linear_norm,
            gate: self.gate,
            window_factor: self.window_factor,
            logit_scale: model.logit_scale(),
            branches: self.branches,
            rows: self.rows,
        };
        model.check_still(&config)?;
        Ok(config)
    }
}
