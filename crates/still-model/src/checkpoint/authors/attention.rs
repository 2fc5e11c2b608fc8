//! The attention of a checkpoint of theirs: its tensors say what is there, its configuration must not say otherwise.
//!
//! Their code has chunk, budget and routing as constants, and most keys of the family of code that it comes from mean nothing in
//! it. Keys for them are read all the same, as other versions may write them.

use std::path::Path;

use serde_json::Value;
use still_attention::{Branches, FeatureMap, LinearNorm, Mode, Router, SelectionHead, StillConfig};

use super::super::{Checkpoint, learned_names, names};
use crate::error::{ModelError, Result};

/// Their constants.
const CHUNK: usize = 64;
const TOPK_RATIO: f64 = 1.0 / 16.0;
const FEATURE_MAP: &str = "still_hedgehog";

/// Tensors that their code saves and nothing is computed from: a table that positions give, and a constant of the attention that
/// it was written from.
const UNUSED: [&str; 2] = ["self_attn.rotary_emb.inv_freq", "self_attn.window_factors"];

/// Keys of a transformers configuration, or of the code that theirs comes from, which say nothing of attention, although they have
/// one of [`ATTENTION_WORDS`] in them; those of theirs that mean nothing.
const MEANINGLESS: [&str; 14] = [
    "attention_dropout",
    "attn_implementation",
    "attn_mode",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "hidden_ratio",
    "add_cross_attention",
    "norm_feature_map",
    "norm_k",
    "norm_q",
    "output_attentions",
    "output_hidden_states",
    "top_k",
    "tie_encoder_decoder",
];
/// Keys that a Llama's configuration is read for.
const LLAMA: [&str; 2] = ["attention_bias", "num_attention_heads"];
/// A key with one of these may change what is computed.
const ATTENTION_WORDS: [&str; 19] = [
    "attn",
    "attention",
    "budget",
    "chunk",
    "expand",
    "factor",
    "feature",
    "gate",
    "house",
    "kernel",
    "linear",
    "norm_k",
    "norm_q",
    "ratio",
    "rout",
    "salien",
    "select",
    "topk",
    "window",
];

/// What the tensors of every layer say.
struct Found {
    gate: bool,
    householder: bool,
    feature_dim: usize,
}

/// The attention of an opened base, from `json`, its `config.json` at `path`, and its tensors.
pub(super) fn read(json: &Value, path: &Path, base: &Checkpoint) -> Result<StillConfig> {
    let found = Found::in_tensors(path, base)?;
    let keys = Keys { json, path };
    keys.refuse_unknown()?;
    keys.expect("feature_map", &[FEATURE_MAP.into()])?;
    keys.expect("tie_feature_map_qk", &[false.into()])?;
    for key in ["expand_k", "expand_v"] {
        keys.expect(key, &[1.into(), 1.0.into()])?;
    }
    keys.expect("attn", &[])?;
    for (key, found) in [
        ("gate", found.gate),
        ("use_gate", found.gate),
        ("householder", found.householder),
        ("use_householder", found.householder),
    ] {
        keys.agree(key, keys.flag(key)?, Some(found))?;
    }
    keys.agree("feature_dim", keys.count("feature_dim")?, Some(found.feature_dim))?;

    let chunk = keys.first(&["chunk_size", "chunk"], Keys::count)?.unwrap_or(CHUNK);
    for key in ["window_size", "decode_window_size"] {
        keys.agree(key, keys.count(key)?, Some(chunk))?;
    }
    let ratio = keys.ratio("topk_ratio")?;
    let of_ratio = |ratio: f64| (chunk as f64 * ratio) as usize;
    let budget = keys.first(&["topk", "budget"], Keys::count)?;
    keys.agree("topk_ratio", ratio.map(of_ratio), budget)?;
    let budget = budget.unwrap_or_else(|| of_ratio(ratio.unwrap_or(TOPK_RATIO)));

    let (layers, heads) = (base.config.num_hidden_layers, base.config.num_attention_heads);
    let still = StillConfig {
        mode: Mode::Hybrid,
        chunk,
        router: Router::SelfSaliency,
        // They repeat keys and values before anything else.
        selection_head: SelectionHead::QueryHead,
        budgets: vec![vec![budget; heads]; layers],
        cap: None,
        feature_map: FeatureMap::NpMap { householder: found.householder },
        feature_dim: found.feature_dim,
        linear_norm: LinearNorm::Sum,
        gate: found.gate,
        logit_scale: None,
        window_factor: false,
        branches: Branches::default(),
        rows: None,
        key_exponents: Vec::new(),
    };
    base.config.check_still(&still).map_err(|error| contradiction(path, error.to_string()))?;
    Ok(still)
}

impl Found {
    fn in_tensors(path: &Path, base: &Checkpoint) -> Result<Self> {
        let layers = base.config.num_hidden_layers;
        // Of each: the layers that have it.
        let (mut maps, mut gates) = (vec![false; layers], vec![false; layers]);
        let (mut hh_q, mut hh_k) = (vec![false; layers], vec![false; layers]);
        for name in base.weights.names() {
            let Some(learned) = learned_names::from_checkpoint(&name) else {
                if UNUSED.iter().any(|unused| name.ends_with(unused)) {
                    base.weights.pass_over(&name);
                } else if names::to_gguf(base.config.architecture, &name).is_none() {
                    return Err(unknown_tensor(path, &name));
                }
                continue;
            };
            let of = match learned.name {
                "feature_map_q" | "feature_map_k" => &mut maps,
                "householder_q" => &mut hh_q,
                "householder_k" => &mut hh_k,
                "g_proj.weight" => &mut gates,
                _ => return Err(unknown_tensor(path, &name)),
            };
            let heads = base.config.num_attention_heads;
            match of.get_mut(learned.layer) {
                Some(has) if learned.head.is_none_or(|head| head < heads) => *has = true,
                _ => {
                    let what = format!(
                        "the weights have {name}, the configuration {layers} layers of {heads} heads"
                    );
                    return Err(contradiction(path, what));
                }
            }
        }
        if !maps.contains(&true) {
            return Err(ModelError::Corrupt {
                path: path.to_path_buf(),
                reason: "says model_type \"still\", but the weights have no feature maps".into(),
                hint: "this is the base that STILL's released code starts from, not what its stage 1 leaves: give that; to \
                       linearize the base, set model_type to what it was (\"llama\")"
                    .into(),
            });
        }
        let everywhere =
            |what: &str, has: &[bool]| match (has.contains(&true), has.contains(&false)) {
                (true, true) => {
                    let layer = has.iter().position(|has| !has).unwrap_or_default();
                    Err(contradiction(path, format!("layer {layer} has no {what}, others have")))
                }
                (has, _) => Ok(has),
            };
        let reflected =
            [everywhere("feature_map_q.hh.u", &hh_q)?, everywhere("feature_map_k.hh.u", &hh_k)?];
        if reflected[0] != reflected[1] {
            let what = "only one of feature_map_q and feature_map_k has a reflection (hh.u)";
            return Err(contradiction(path, what.into()));
        }
        let first = learned_names::to_checkpoint("model.layers.0.self_attn.feature_map_q", 0);
        let feature_dim = match base.weights.shape(&first).as_deref() {
            Some(&[feature_dim, _]) => feature_dim,
            Some(shape) => {
                let what = format!("tensor {first} has shape {shape:?}, not [features, head_dim]");
                return Err(contradiction(path, what));
            }
            None => return Err(contradiction(path, format!("tensor {first} is missing"))),
        };
        let gate = everywhere("g_proj.weight", &gates)?;
        Ok(Self { gate, householder: reflected[0], feature_dim })
    }
}

/// A `config.json` with errors that name it and the key.
struct Keys<'a> {
    json: &'a Value,
    path: &'a Path,
}

impl Keys<'_> {
    /// The value of a key that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.parsed(key, "a whole number", |value| value.as_u64()?.try_into().ok())
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.parsed(key, "true or false", Value::as_bool)
    }

    fn ratio(&self, key: &str) -> Result<Option<f64>> {
        let share = |value: &Value| value.as_f64().filter(|ratio| (0.0..=1.0).contains(ratio));
        self.parsed(key, "a share between 0 and 1", share)
    }

    fn parsed<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        parse(value).map(Some).ok_or_else(|| {
            contradiction(self.path, format!("\"{key}\" is {value}, not {expected}"))
        })
    }

    /// The value of several keys that mean the same.
    fn first<T: PartialEq + std::fmt::Debug + Copy>(
        &self,
        keys: &[&str],
        read: impl Fn(&Self, &str) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let mut found = None;
        for key in keys {
            let value = read(self, key)?;
            self.agree(key, value, found)?;
            found = found.or(value);
        }
        Ok(found)
    }

    /// An error if a key says something else than what is known.
    fn agree<T: PartialEq + std::fmt::Debug>(
        &self,
        key: &str,
        said: Option<T>,
        known: Option<T>,
    ) -> Result<()> {
        match (said, known) {
            (Some(said), Some(known)) if said != known => Err(contradiction(
                self.path,
                format!("\"{key}\" gives {said:?}, but other keys or the tensors {known:?}"),
            )),
            _ => Ok(()),
        }
    }

    /// An error if a key has a value that is none of `supported`.
    fn expect(&self, key: &str, supported: &[Value]) -> Result<()> {
        match self.get(key) {
            Some(value) if !supported.contains(value) => {
                let all: Vec<String> = supported.iter().map(Value::to_string).collect();
                let hint = match all.first() {
                    Some(value) => format!("supported: {value}, or leave it out"),
                    None => "supported: null, or leave it out".into(),
                };
                Err(ModelError::Unsupported {
                    what: format!("\"{key}\": {value} in a checkpoint of STILL's authors"),
                    found_in: Some(self.path.to_path_buf()),
                    hint,
                })
            }
            _ => Ok(()),
        }
    }

    /// An error for a key that speaks of attention and is not known.
    fn refuse_unknown(&self) -> Result<()> {
        const READ: [&str; 17] = [
            "feature_map",
            "tie_feature_map_qk",
            "expand_k",
            "expand_v",
            "attn",
            "gate",
            "use_gate",
            "householder",
            "use_householder",
            "feature_dim",
            "chunk_size",
            "chunk",
            "window_size",
            "decode_window_size",
            "topk_ratio",
            "topk",
            "budget",
        ];
        let known = |key: &str| {
            key.starts_with('_')
                || [&READ[..], &MEANINGLESS, &LLAMA].iter().any(|keys| keys.contains(&key))
        };
        let suspicious = |key: &str| ATTENTION_WORDS.iter().any(|word| key.contains(word));
        let keys = self.json.as_object().into_iter().flatten();
        for (key, value) in keys.filter(|(_, value)| !value.is_null()) {
            if suspicious(key) && !known(key) {
                return Err(ModelError::Unsupported {
                    what: format!("\"{key}\": {value} in a checkpoint of STILL's authors"),
                    found_in: Some(self.path.to_path_buf()),
                    hint: "their released code has no such key; if it changes nothing that is computed, remove it".into(),
                });
            }
        }
        Ok(())
    }
}

fn contradiction(path: &Path, reason: String) -> ModelError {
    ModelError::Corrupt {
        path: path.to_path_buf(),
        reason,
        hint: "configuration and weights do not belong together, or are not from STILL's released code".into(),
    }
}

fn unknown_tensor(path: &Path, name: &str) -> ModelError {
    ModelError::Unsupported {
        what: format!("tensor {name}, which a checkpoint of STILL's authors does not have,"),
        found_in: path.parent().map(Path::to_path_buf),
        hint: "such a checkpoint has a Llama's tensors and, in each layer, feature_map_{q,k}.mlp.linears.N.weight, \
               feature_map_{q,k}.hh.u and g_proj.weight"
            .into(),
    }
}
