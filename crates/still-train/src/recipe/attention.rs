//! `[attention]`: the student's operator.

use serde::{Deserialize, Serialize};
use still_attention::{
    Branches, FeatureMap, HeadGeometry, KeyExponents, LinearNorm, Mode, Router, RowDtype,
    SelectionHead, StillConfig,
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
    /// By how much coded keys are scaled, `[layer][KV head]`: a text of an exponent of two for each channel. Calibration finds them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub key_exponents: Vec<Vec<KeyExponents>>,
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
            key_exponents: Vec::new(),
        }
    }
}

impl AttentionRecipe {
    /// The same without what calibration finds.
    #[must_use]
    pub fn without_calibration(&self) -> Self {
        Self { budgets: None, key_exponents: Vec::new(), ..self.clone() }
    }

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
            key_exponents: self.key_exponents.clone(),
        };
        model.check_still(&config)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fmt::Debug;

    use still_model::random::tiny_config;

    use super::*;

    /// A structure's fields and their values, as its debug form says.
    fn fields(of: &impl Debug) -> BTreeMap<String, String> {
        let text = format!("{of:#?}");
        let body = text.split_once('{').and_then(|(_, body)| body.rsplit_once('}')).unwrap().0;
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in body.lines().filter(|line| !line.is_empty()) {
            match line.strip_prefix("    ").filter(|line| line.starts_with(char::is_alphabetic)) {
                Some(line) => {
                    let (name, value) = line.split_once(": ").unwrap();
                    fields.push((name.into(), value.into()));
                }
                None => fields.last_mut().unwrap().1.push_str(line.trim()),
            }
        }
        fields.into_iter().collect()
    }

    /// What is equal in both, less the names that one of them alone has or resolves.
    fn agree(
        a: &BTreeMap<String, String>,
        b: &BTreeMap<String, String>,
        but: [&[&str]; 2],
    ) -> BTreeSet<String> {
        for (one, other, but) in [(a, b, but[0]), (b, a, but[1])] {
            let differ = one.iter().filter(|(name, value)| other.get(*name) != Some(value));
            let differ: Vec<&str> = differ.map(|(name, _)| name.as_str()).collect();
            assert!(differ.iter().all(|name| but.contains(name)), "{differ:?} differ, not {but:?}");
        }
        a.keys().filter(|name| b.contains_key(*name)).cloned().collect()
    }

    /// Recipe, student and layer declare the attention's fields each: a value of the first is that of all.
    #[test]
    fn what_a_recipe_says_is_what_student_and_layer_have() {
        let linear = AttentionRecipe {
            mode: Mode::LinearOnly,
            budget: 0,
            router: Router::None,
            linear_norm: LinearNorm::Sum,
            ..AttentionRecipe::default()
        };
        let exponents = KeyExponents::new(vec![1; tiny_config().head_dim]).unwrap();
        let changed = AttentionRecipe {
            chunk: 32,
            budget: 3,
            cap: Some(9),
            router: Router::Random { seed: 7 },
            selection_head: SelectionHead::QueryHead,
            feature_map: FeatureMap::Softmax,
            feature_dim: Some(4),
            init: FeatureInit::Normal,
            gate: true,
            window_factor: true,
            branches: Branches { window: false, ..Branches::default() },
            rows: Some(RowDtype::Int8),
            key_exponents: vec![vec![exponents; 2]; 2],
            ..linear.clone()
        };
        let changed = AttentionRecipe { mode: Mode::Hybrid, ..changed };
        let scaled = ModelConfig { query_pre_attn_scalar: Some(16.0), ..tiny_config() };
        let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (recipe, model) in [
            (AttentionRecipe::default(), tiny_config()),
            (linear, tiny_config()),
            (changed, scaled),
        ] {
            let still = recipe.resolve(&model).unwrap();
            let own = fields(&still);
            agree(
                &fields(&recipe),
                &own,
                [
                    &["budget", "budgets", "feature_dim", "init"],
                    &["budgets", "feature_dim", "logit_scale"],
                ],
            );
            let layer = still.layer(1).unwrap();
            let of_layer = still.key_exponents.get(1).cloned().unwrap_or_default();
            assert_eq!(layer.key_exponents, of_layer);
            let layer = fields(&layer);
            let but: [&[&str]; 2] =
                [&["budgets", "key_exponents", "rows"], &["layer", "budgets", "key_exponents"]];
            let shared = agree(&own, &layer, but);
            assert_eq!(shared.len(), layer.len() - 1, "all but the layer's number");
            own.into_iter().for_each(|(name, value)| {
                seen.entry(name).or_default().insert(value);
            });
        }
        let constant: Vec<_> = seen.iter().filter(|(_, values)| values.len() < 2).collect();
        assert!(constant.is_empty(), "the cases above set no other value of {constant:?}");
    }
}
