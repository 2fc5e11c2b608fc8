//! The configuration of hybrid attention: everything but its weights.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{AttentionError, Result};
use crate::key_exponents::KeyExponents;

/// The longest chunk, in tokens. A state keeps two chunks of exact rows a head.
pub const MAX_CHUNK: usize = 1 << 16;
/// The most columns of a feature map's matrix.
pub const MAX_FEATURE_DIM: usize = 1 << 12;
/// The largest cap, in tokens: no sequence is longer.
pub const MAX_CAP: usize = i32::MAX as usize;

/// Head counts of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadGeometry {
    /// Query heads `H`.
    pub num_heads: usize,
    /// Key/value heads `K`; `H` is a multiple of it.
    pub num_key_value_heads: usize,
    /// Channels of one head `D`.
    pub head_dim: usize,
}

impl HeadGeometry {
    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_key_value_heads
    }

    /// Selection heads `S` under a granularity.
    pub fn selection_heads(&self, granularity: SelectionHead) -> usize {
        match granularity {
            SelectionHead::KvHead => self.num_key_value_heads,
            SelectionHead::QueryHead => self.num_heads,
        }
    }
}

/// The factor of `q·k` in logits: the given one, or `1/√D`.
pub(crate) fn logit_scale(given: Option<f64>, head_dim: usize) -> f64 {
    given.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt())
}

/// Checks that a logit scale is a positive number.
pub(crate) fn check_logit_scale(given: Option<f64>) -> Result<()> {
    match given.filter(|scale| !(scale.is_finite() && *scale > 0.0)) {
        None => Ok(()),
        Some(scale) => Err(AttentionError::Config(format!(
            "logit_scale is {scale}, expected a positive number"
        ))),
    }
}

/// How the tokens of a retiring chunk are ranked.
///
/// A new router is one more variant here and, if positions alone decide, one more arm in
/// [`crate::router::position_score`]; a score of queries, keys or values is computed by the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Router {
    /// The Self-Saliency Score (STILL).
    #[default]
    SelfSaliency,
    /// The attention that a token receives from later ones while it is in their window.
    ReceivedAttention,
    /// The squared error of recalling a token's value from the linear state, before the token enters it (LoLA). Under a cap
    /// the tokens that are kept are scored anew whenever a chunk retires.
    SelfRecall,
    /// The earlier, the better. With a budget and a cap of 4: the first 4 tokens of the sequence (StreamingLLM).
    FirstTokens,
    /// A hash of (seed, layer, head, absolute position): the ablation's control.
    Random {
        /// Seed of the hash.
        seed: u64,
    },
    /// No token is salient, whatever the budgets say.
    None,
}

impl Router {
    /// Its name in recipes and configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::SelfSaliency => "self_saliency",
            Self::ReceivedAttention => "received_attention",
            Self::SelfRecall => "self_recall",
            Self::FirstTokens => "first_tokens",
            Self::Random { .. } => "random",
            Self::None => "none",
        }
    }

    /// What it ranks tokens by, in words.
    pub fn in_words(self) -> String {
        match self {
            Self::SelfSaliency => "Self-Saliency Score".into(),
            Self::ReceivedAttention => "attention received".into(),
            Self::SelfRecall => "self-recall error".into(),
            Self::FirstTokens => "the first tokens".into(),
            Self::Random { seed } => format!("random (seed {seed})"),
            Self::None => "none".into(),
        }
    }
}

/// The head at which routing is decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectionHead {
    /// One decision per KV head, shared by its group of query heads.
    #[default]
    KvHead,
    /// One decision per query head (the paper's code; K/V rows are kept per query head).
    QueryHead,
}

/// The feature map `φ` of the linear branch.
///
/// A new map is one more variant here and one more arm in the kernels (`cpu/feature_map.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// Norm-Preserved Feature Map: `[softmax(u); softmax(−u)]`, `u = ‖x‖·f(x)/‖f(x)‖`.
    NpMap {
        /// Reflect `x` by a learned per-head Householder vector first.
        householder: bool,
    },
    /// LoLCATs' Hedgehog map: `[softmax(xW); softmax(−xW)]`.
    Softmax,
}

impl FeatureMap {
    /// Its name in recipes and configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::NpMap { .. } => "np_map",
            Self::Softmax => "softmax",
        }
    }

    /// Whether rows are reflected by a learned vector first.
    pub fn reflects(self) -> bool {
        self == Self::NpMap { householder: true }
    }
}

impl Default for FeatureMap {
    fn default() -> Self {
        Self::NpMap { householder: false }
    }
}

/// Scale of the linear branch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearNorm {
    /// `λ = 1` (the paper).
    Sum,
    /// `λ = exp(ℓ_h) / max(n, 1)` with `ℓ_h` learned per query head.
    #[default]
    Mean,
}

/// Hybrid attention, or linear attention alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The window and the salient tokens are exact; all others are in the linear state.
    #[default]
    Hybrid,
    /// Every token enters the linear state at once, and none stays exact (Hedgehog). Settings of exact tokens, and scales of
    /// numerator and denominator alike, have no meaning then and are refused.
    LinearOnly,
}

/// A denominator of linear attention alone is at least this: where every `φ(q)ᵀφ(k)` underflows, the output is 0, not 0/0.
pub(crate) const MIN_DENOMINATOR: f64 = 1e-30;

/// Which parts of the operator are on; all by default. The others are ablations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Branches {
    /// Off: the keys of the current and the previous chunk are dropped except the token itself.
    pub window: bool,
    /// Off: selected tokens are neither attended to nor absorbed.
    pub salient: bool,
    /// Off: no second terms in numerator and denominator.
    pub linear: bool,
}

impl Default for Branches {
    fn default() -> Self {
        Self { window: true, salient: true, linear: true }
    }
}

/// The hybrid attention of a whole model: the `still` section of a student's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StillConfig {
    /// Hybrid attention, or linear attention alone.
    #[serde(default)]
    pub mode: Mode,
    /// Chunk length `C` in tokens, 1 … [`MAX_CHUNK`].
    pub chunk: usize,
    /// How tokens are ranked.
    pub router: Router,
    /// Where routing is decided.
    pub selection_head: SelectionHead,
    /// Salient tokens kept of each retired chunk: `[layer][selection head]`, 0 … C. A layer without heads here keeps the attention
    /// that it has.
    pub budgets: Vec<Vec<usize>>,
    /// At most this many salient tokens per selection head, up to [`MAX_CAP`]; the lowest are demoted.
    pub cap: Option<usize>,
    /// The feature map.
    pub feature_map: FeatureMap,
    /// Columns `F` of a feature map's matrix, 1 … [`MAX_FEATURE_DIM`]; `φ` has `2F` channels.
    pub feature_dim: usize,
    /// Scale of the linear branch.
    pub linear_norm: LinearNorm,
    /// Whether the linear numerator is gated by `sigmoid(W_g x)`.
    pub gate: bool,
    /// Whether the exact terms are multiplied by a learned `sigmoid(w_h)` (LoLCATs), the linear ones by 1.
    #[serde(default)]
    pub window_factor: bool,
    /// What `q·k` is multiplied by in logits and scores, not in feature maps; `1/√D` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_scale: Option<f64>,
    /// Branch switches.
    #[serde(default)]
    pub branches: Branches,
    /// Dtype of exact rows in the student's cache. If absent, the program that runs it decides. Training computes with plain rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowDtype>,
    /// By how much coded keys are scaled: `[layer][KV head]`, empty where nothing is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub key_exponents: Vec<Vec<KeyExponents>>,
}

impl StillConfig {
    /// How a layer stores its rows where `rows` are asked for: in int8 in place of int4 if keys of a head have wide channels
    /// ([`KeyExponents::are_wide`]).
    pub fn stored_rows(&self, layer: usize, rows: RowDtype) -> RowDtype {
        stored_rows(rows, self.key_exponents.get(layer).map_or(&[], Vec::as_slice))
    }

    /// The defaults of this project, with the same budget in every head: `kv_head`, mean, NP-Map, no gate.
    pub fn uniform(num_layers: usize, geometry: HeadGeometry, chunk: usize, budget: usize) -> Self {
        let selection_head = SelectionHead::default();
        Self {
            mode: Mode::default(),
            chunk,
            router: Router::default(),
            selection_head,
            budgets: vec![vec![budget; geometry.selection_heads(selection_head)]; num_layers],
            cap: None,
            feature_map: FeatureMap::default(),
            feature_dim: geometry.head_dim,
            linear_norm: LinearNorm::default(),
            gate: false,
            window_factor: false,
            logit_scale: None,
            branches: Branches::default(),
            rows: None,
            key_exponents: Vec::new(),
        }
    }

    /// Only the sliding window: budget 0 and no linear branch.
    pub fn window_only(num_layers: usize, geometry: HeadGeometry, chunk: usize) -> Self {
        let mut config = Self::uniform(num_layers, geometry, chunk, 0);
        config.branches.linear = false;
        config
    }

    /// StreamingLLM: the sliding window and the first `sinks` tokens of the sequence.
    ///
    /// Positions are those of the sequence, not renumbered in the cache.
    pub fn streaming_llm(
        num_layers: usize,
        geometry: HeadGeometry,
        chunk: usize,
        sinks: usize,
    ) -> Self {
        let mut config = Self::uniform(num_layers, geometry, chunk, sinks);
        config.router = Router::FirstTokens;
        config.cap = Some(sinks);
        config.branches.linear = false;
        config
    }

    /// LoLCATs: the window, and all older tokens in the linear state. A learned factor weights the two.
    pub fn lolcats(num_layers: usize, geometry: HeadGeometry, chunk: usize) -> Self {
        Self {
            router: Router::None,
            feature_map: FeatureMap::Softmax,
            linear_norm: LinearNorm::Sum,
            window_factor: true,
            ..Self::uniform(num_layers, geometry, chunk, 0)
        }
    }

    /// LoLA: LoLCATs with an exact cache of `cache` tokens per selection head.
    pub fn lola(num_layers: usize, geometry: HeadGeometry, chunk: usize, cache: usize) -> Self {
        Self::lolcats(num_layers, geometry, chunk).with_recall_cache(cache)
    }

    /// Adds an exact cache of `cache` tokens per selection head: those that the linear state recalls worst.
    /// It needs no training.
    #[must_use]
    pub fn with_recall_cache(self, cache: usize) -> Self {
        // Every token of a retiring chunk is a candidate.
        let budgets = self.budgets.iter().map(|heads| vec![self.chunk; heads.len()]).collect();
        Self { router: Router::SelfRecall, budgets, cap: Some(cache), ..self }
    }

    /// Linear attention alone, with Hedgehog's feature map.
    pub fn linear_only(num_layers: usize, geometry: HeadGeometry, chunk: usize) -> Self {
        Self {
            mode: Mode::LinearOnly,
            router: Router::None,
            feature_map: FeatureMap::Softmax,
            linear_norm: LinearNorm::Sum,
            ..Self::uniform(num_layers, geometry, chunk, 0)
        }
    }

    /// The configuration of one layer.
    ///
    /// # Errors
    /// If the layer has no budgets.
    pub fn layer(&self, layer: usize) -> Result<HybridConfig> {
        let budgets = self.budgets.get(layer).cloned().ok_or_else(|| {
            AttentionError::Config(format!(
                "budgets cover {} layers, layer {layer} was asked for",
                self.budgets.len()
            ))
        })?;
        Ok(HybridConfig {
            layer,
            mode: self.mode,
            chunk: self.chunk,
            router: self.router,
            selection_head: self.selection_head,
            budgets,
            cap: self.cap,
            feature_map: self.feature_map,
            feature_dim: self.feature_dim,
            linear_norm: self.linear_norm,
            gate: self.gate,
            window_factor: self.window_factor,
            logit_scale: self.logit_scale,
            branches: self.branches,
            key_exponents: self.key_exponents.get(layer).cloned().unwrap_or_default(),
        })
    }

    /// Restricts hybrid attention to these layers. The others keep their attention.
    #[must_use]
    pub fn in_layers(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        let mut hybrid = vec![false; self.budgets.len()];
        layers.into_iter().for_each(|layer| hybrid[layer] = true);
        for (budgets, hybrid) in self.budgets.iter_mut().zip(hybrid) {
            if !hybrid {
                budgets.clear();
            }
        }
        self
    }

    /// Checks every layer against the model's geometry.
    ///
    /// # Errors
    /// Names the layer and the value that does not fit.
    pub fn validate(&self, num_layers: usize, geometry: HeadGeometry) -> Result<()> {
        self.validate_number(num_layers)?;
        (0..num_layers).try_for_each(|layer| self.layer(layer)?.validate(geometry))
    }

    /// [`StillConfig::validate`] of a model in which `layers` alone are hybrid: the others have no budgets.
    ///
    /// # Errors
    /// Names the layer and the value that does not fit.
    pub fn validate_in(
        &self,
        num_layers: usize,
        layers: impl IntoIterator<Item = usize>,
        geometry: HeadGeometry,
    ) -> Result<()> {
        let mut kept = vec![true; num_layers];
        layers.into_iter().for_each(|layer| kept[layer] = false);
        if self.budgets.len() == num_layers
            && let Some(layer) =
                (0..num_layers).find(|&layer| kept[layer] && !self.budgets[layer].is_empty())
        {
            return Err(AttentionError::Config(format!(
                "layer {layer} has budgets, but keeps its attention to a sliding window: leave its list empty"
            )));
        }
        let has_exponents =
            |layer: usize| self.key_exponents.get(layer).is_some_and(|e| !e.is_empty());
        if let Some(layer) = (0..num_layers).find(|&layer| kept[layer] && has_exponents(layer)) {
            return Err(AttentionError::Config(format!(
                "layer {layer} has key exponents, but keeps its attention to a sliding window: leave its list empty"
            )));
        }
        if kept.iter().all(|&kept| kept) {
            return Err(AttentionError::Config(
                "no layer attends to all tokens, so that there is nothing to linearize".into(),
            ));
        }
        self.validate_number(num_layers)?;
        let mut hybrid = (0..num_layers).filter(|&layer| !kept[layer]);
        hybrid.try_for_each(|layer| self.layer(layer)?.validate(geometry))
    }

    fn validate_number(&self, num_layers: usize) -> Result<()> {
        if let (Mode::LinearOnly, Some(rows)) = (self.mode, self.rows) {
            return Err(AttentionError::Config(format!(
                "linear_only keeps no exact rows, which are to be stored in {rows}: leave rows out"
            )));
        }
        let layers = self.key_exponents.len();
        if layers != 0 && layers != num_layers {
            return Err(AttentionError::Config(format!(
                "key exponents cover {layers} layers, the model has {num_layers}"
            )));
        }
        match self.budgets.len() == num_layers {
            true => Ok(()),
            false => Err(AttentionError::Config(format!(
                "budgets cover {} layers, the model has {num_layers}",
                self.budgets.len()
            ))),
        }
    }
}

/// The hybrid attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct HybridConfig {
    /// Index of the layer (the random router's hash takes it).
    pub layer: usize,
    /// Hybrid attention, or linear attention alone.
    pub mode: Mode,
    /// Chunk length `C` in tokens.
    pub chunk: usize,
    /// How tokens are ranked.
    pub router: Router,
    /// Where routing is decided.
    pub selection_head: SelectionHead,
    /// Budget of each selection head, 0 … C.
    pub budgets: Vec<usize>,
    /// Most salient tokens per selection head.
    pub cap: Option<usize>,
    /// The feature map.
    pub feature_map: FeatureMap,
    /// Columns `F` of a feature map's matrix.
    pub feature_dim: usize,
    /// Scale of the linear branch.
    pub linear_norm: LinearNorm,
    /// Whether the linear numerator is gated.
    pub gate: bool,
    /// Whether the exact terms are multiplied by a learned `sigmoid(w_h)`.
    pub window_factor: bool,
    /// What `q·k` is multiplied by in logits and scores; `1/√D` if absent.
    pub logit_scale: Option<f64>,
    /// Branch switches.
    pub branches: Branches,
    /// By how much coded keys are scaled, by KV head; empty: not at all.
    pub key_exponents: Vec<KeyExponents>,
}

impl HybridConfig {
    /// As [`StillConfig::stored_rows`].
    pub fn stored_rows(&self, rows: RowDtype) -> RowDtype {
        stored_rows(rows, &self.key_exponents)
    }

    /// Checks the layer against the head geometry.
    ///
    /// # Errors
    /// Names the value that does not fit.
    pub fn validate(&self, geometry: HeadGeometry) -> Result<()> {
        let fail = |message: String| Err(AttentionError::Config(message));
        let HeadGeometry { num_heads, num_key_value_heads, head_dim } = geometry;
        if num_key_value_heads == 0 || num_heads == 0 || num_heads % num_key_value_heads != 0 {
            return fail(format!(
                "{num_heads} query heads cannot share {num_key_value_heads} key/value heads"
            ));
        }
        if head_dim == 0 {
            return fail("head_dim must be positive".into());
        }
        for (name, value, most) in [
            ("chunk", self.chunk, MAX_CHUNK),
            ("feature_dim", self.feature_dim, MAX_FEATURE_DIM),
            ("cap", self.cap.unwrap_or(1), MAX_CAP),
        ] {
            if value > most || (value == 0 && name != "cap") {
                return fail(format!("{name} is {value}, expected 1 to {most}"));
            }
        }
        check_logit_scale(self.logit_scale)?;
        let selection_heads = geometry.selection_heads(self.selection_head);
        if self.budgets.len() != selection_heads {
            return fail(format!(
                "layer {}: {} budgets for {selection_heads} selection heads",
                self.layer,
                self.budgets.len()
            ));
        }
        if let Some(budget) = self.budgets.iter().find(|&&budget| budget > self.chunk) {
            return fail(format!(
                "layer {}: a budget of {budget} exceeds the chunk of {} tokens",
                self.layer, self.chunk
            ));
        }
        self.validate_key_exponents(geometry)?;
        match self.mode {
            Mode::Hybrid => Ok(()),
            Mode::LinearOnly => self.validate_linear_only(),
        }
    }

    fn validate_key_exponents(&self, geometry: HeadGeometry) -> Result<()> {
        let HeadGeometry { num_key_value_heads, head_dim, .. } = geometry;
        let (layer, heads) = (self.layer, self.key_exponents.len());
        if heads != 0 && heads != num_key_value_heads {
            return Err(AttentionError::Config(format!(
                "layer {layer}: key exponents of {heads} heads, expected {num_key_value_heads} key/value heads"
            )));
        }
        let wrong = |exponents: &&KeyExponents| exponents.values().len() != head_dim;
        match self.key_exponents.iter().find(wrong) {
            None => Ok(()),
            Some(exponents) => Err(AttentionError::Config(format!(
                "layer {layer}: {} key exponents of a head, expected one for each of {head_dim} channels",
                exponents.values().len()
            ))),
        }
    }

    /// For linear attention alone: refuses settings that would have no effect.
    fn validate_linear_only(&self) -> Result<()> {
        let refused = [
            (self.budgets.iter().any(|&budget| budget > 0), "budgets", "set every budget to 0"),
            (self.cap.is_some(), "a cap", "leave it out"),
            (self.router != Router::None, "a router", "set router to \"none\""),
            (!self.key_exponents.is_empty(), "key exponents", "leave them out"),
            (self.gate, "an output gate", "set gate to false"),
            (self.window_factor, "a window factor", "set window_factor to false"),
            (self.linear_norm != LinearNorm::Sum, "a learned scale", "set linear_norm to \"sum\""),
            (
                self.branches != Branches::default(),
                "branches to switch off",
                "leave all of them on",
            ),
        ];
        match refused.into_iter().find(|(given, ..)| *given) {
            None => Ok(()),
            Some((_, what, hint)) => Err(AttentionError::Config(format!(
                "layer {}: linear_only does not have {what}: {hint}",
                self.layer
            ))),
        }
    }

    /// The exponents of the keys that a selection head keeps, where some channel is scaled.
    pub(crate) fn key_exponents_of(
        &self,
        geometry: HeadGeometry,
        head: usize,
    ) -> Option<&KeyExponents> {
        let heads = geometry.selection_heads(self.selection_head);
        let kv_head = head * geometry.num_key_value_heads / heads;
        self.key_exponents.get(kv_head).filter(|exponents| !exponents.are_zero())
    }

    /// Whether a selection head's salient keys have a scale for 32 tokens of a channel ([`RowDtype::Int4`]): it keeps every token,
    /// and they come by whole groups.
    pub(crate) fn codes_keys_by_channel(
        &self,
        head_dim: usize,
        head: usize,
        rows: RowDtype,
    ) -> bool {
        let whole = self.cap.is_none() && self.budgets[head] == self.chunk;
        let in_groups = [self.chunk, head_dim].iter().all(|x| x.is_multiple_of(FOUR_BIT_GROUP));
        rows == RowDtype::Int4
            && self.mode == Mode::Hybrid
            && self.selection_head == SelectionHead::KvHead
            && whole
            && in_groups
    }

    /// Chunk length of the window that a state keeps: 0 if nothing is exact.
    pub(crate) fn ring_chunk(&self) -> usize {
        match self.mode {
            Mode::Hybrid => self.chunk,
            Mode::LinearOnly => 0,
        }
    }
}

fn stored_rows(rows: RowDtype, of_layer: &[KeyExponents]) -> RowDtype {
    match rows {
        RowDtype::Int4 if of_layer.iter().any(KeyExponents::are_wide) => RowDtype::Int8,
        _ => rows,
    }
}

/// Values of a row, or of a channel, that share a scale and an offset in [`RowDtype::Int4`].
pub(crate) const FOUR_BIT_GROUP: usize = 32;

/// How the exact rows of K and V are stored in a state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowDtype {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value: the default of inference. The queries of a hybrid state's salient keys are rounded alike.
    #[default]
    Bf16,
    /// 2 bytes a value.
    F16,
    /// 1 byte a value and 4 a row for its scale. A hybrid state's window stays bf16: only what is kept is 8-bit.
    Int8,
    /// Half a byte a value, and 4 bytes for each 32 values of a row: a scale and an offset in f16. A hybrid state's window stays
    /// bf16. Where a KV head keeps every token, without a cap, the keys' 32 values are those of a channel: of 32 tokens.
    Int4,
}

impl RowDtype {
    /// Every format.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::F16, Self::Int8, Self::Int4];

    /// As in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// Bytes of a row of `width` values, its scales among them.
    pub fn row_bytes(self, width: usize) -> usize {
        let values = match self {
            Self::F32 => 4 * width,
            Self::Bf16 | Self::F16 => 2 * width,
            Self::Int8 => width,
            Self::Int4 => width.div_ceil(2),
        };
        values + self.scale_bytes(width)
    }

    /// Bytes of the scales and offsets of a row of `width` values.
    pub fn scale_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => 0,
            Self::Int8 => size_of::<f32>(),
            Self::Int4 => width.div_ceil(FOUR_BIT_GROUP) * 2 * size_of::<u16>(),
        }
    }

    /// Whether rows are codes that scales give values to.
    pub fn is_coded(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// How a hybrid state stores its window's rows.
    pub fn window(self) -> Self {
        if self.is_coded() { Self::Bf16 } else { self }
    }
}

impl fmt::Display for RowDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for RowDtype {
    type Err = AttentionError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|rows| rows.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            AttentionError::Config(format!("no row format is called {name:?}: use one of {names}"))
        })
    }
}
