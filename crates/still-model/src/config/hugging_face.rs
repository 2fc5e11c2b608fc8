//! Hugging Face's `config.json`, both ways.

use serde_json::{Value, json};

use super::family::WindowKey;
use super::read::Table;
use super::rope::Rope;
use super::{
    Architecture, Biased, HEAD_DIM, HEADS, HIDDEN_SIZE, INTERMEDIATE_SIZE, LAYERS, MAX_POSITIONS,
    ModelConfig, QUERY_SCALAR, RMS_NORM_EPS, SlidingAttention, VOCABULARY, refused, rope, window,
};
use crate::error::{ModelError, Result};

/// Whether o has a bias where `attention_bias` says otherwise of q, k and v. Hugging Face has no word for it; GGUF files may be so.
const OUTPUT_BIAS: &str = "attention_output_bias";

impl ModelConfig {
    /// Reads a Hugging Face `config.json`. What it leaves out is as in transformers; what changes the arithmetic and is not
    /// computed here is refused.
    ///
    /// # Errors
    /// An unsupported architecture or option (named), a value that is missing, of another type, out of range or
    /// contradictory.
    pub fn from_hf_json(json: &Value) -> Result<Self> {
        let table = &Table::root(json)?;
        let name = table.text("model_type")?.ok_or_else(|| table.missing("model_type"))?;
        let architecture = Architecture::from_model_type(name)?;
        let family = architecture.family();
        let required = |key: &str, range| table.size(key, range)?.ok_or_else(|| table.missing(key));
        refuse_activation(table, architecture)?;
        let biases = Biases::read(table, architecture)?;
        let hidden_size = required("hidden_size", HIDDEN_SIZE)?;
        let num_attention_heads = required("num_attention_heads", HEADS)?;
        let max_position_embeddings = table.size("max_position_embeddings", 1..=MAX_POSITIONS)?;
        let max_position_embeddings =
            max_position_embeddings.unwrap_or(family.max_position_embeddings);
        let num_key_value_heads = match table.size("num_key_value_heads", HEADS)? {
            Some(heads) => heads,
            None if table.mentions("num_key_value_heads") => num_attention_heads,
            None => family.num_key_value_heads.unwrap_or(num_attention_heads),
        };
        let head_dim = match table.size("head_dim", HEAD_DIM)?.or(family.head_dim) {
            Some(head_dim) => head_dim,
            None if !hidden_size.is_multiple_of(num_attention_heads) => {
                return Err(ModelError::Invalid(format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}, and \
                     there is no head_dim"
                )));
            }
            None => hidden_size / num_attention_heads,
        };
        let Rope { theta: rope_theta, scaling: rope_scaling, partial, local_theta } =
            rope::read(table, architecture, max_position_embeddings)?;
        let num_hidden_layers = required("num_hidden_layers", LAYERS)?;
        let sliding = window::sliding(table, architecture, num_hidden_layers)?;
        let sliding = sliding
            .zip(local_theta)
            .map(|((window, layers), rope_theta)| SlidingAttention { window, layers, rope_theta });
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: required("intermediate_size", INTERMEDIATE_SIZE)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: required("vocab_size", VOCABULARY)?,
            rms_norm_eps: table
                .number("rms_norm_eps", RMS_NORM_EPS)?
                .unwrap_or(family.rms_norm_eps),
            rope_theta,
            rope_scaling,
            partial_rotary_factor: partial,
            query_pre_attn_scalar: query_scalar(table, architecture, head_dim)?,
            sliding,
            max_position_embeddings,
            tie_word_embeddings: table
                .flag("tie_word_embeddings")?
                .unwrap_or(family.tie_word_embeddings),
            attention_bias: biases.attention,
            attention_output_bias: biases.attention_output,
            mlp_bias: biases.mlp,
            bos_token_id: table.id("bos_token_id")?,
            eos_token_ids: table.ids("eos_token_id")?,
        };
        config.validate()?;
        window::refuse(table, &config)?;
        refused::refuse(table, &config)?;
        Ok(config)
    }

    /// Adds what ends generation by a `generation_config.json`.
    ///
    /// # Errors
    /// Ids that are none.
    pub(crate) fn add_end_tokens(&mut self, generation: &Value) -> Result<()> {
        for id in Table::root(generation)?.ids("eos_token_id")? {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }

    /// Writes what [`ModelConfig::from_hf_json`] reads.
    pub fn to_hf_json(&self) -> Value {
        let family = self.architecture.family();
        let mut json = json!({
            "architectures": [family.class_name],
            "model_type": family.model_type,
            family.activation_key: family.activation_names[0],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids,
        });
        match family.window {
            // A model that does not say so has a window.
            WindowKey::Window(Some(_)) => json["sliding_window"] = Value::Null,
            WindowKey::Pattern { .. } => self.add_sliding(&mut json),
            _ => {}
        }
        if family.query_pre_attn_scalar.is_some() {
            // An integer where it can be: Hugging Face's own type.
            json["query_pre_attn_scalar"] = match self.query_pre_attn_scalar {
                None => self.head_dim.into(),
                Some(scalar) if scalar.fract() == 0.0 => (scalar as u64).into(),
                Some(scalar) => scalar.into(),
            };
        }
        if family.biased.optional_attention() {
            json["attention_bias"] = self.attention_bias.into();
            if self.attention_output_bias != self.attention_bias {
                json[OUTPUT_BIAS] = self.attention_output_bias.into();
            }
        }
        if family.biased.optional_mlp() {
            json["mlp_bias"] = self.mlp_bias.into();
        }
        if family.partial_rotation {
            json["partial_rotary_factor"] = self.partial_rotary_factor.into();
        }
        if let Some(scaling) = &self.rope_scaling {
            json["rope_scaling"] = rope::to_json(scaling);
        }
        json
    }

    /// Which layers have a sliding window, and what is theirs.
    fn add_sliding(&self, json: &mut Value) {
        let kind = |layer| match self.sliding_window(layer) {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        json["layer_types"] = (0..self.num_hidden_layers).map(kind).collect();
        if let Some(sliding) = &self.sliding {
            json["sliding_window"] = sliding.window.into();
            json["rope_local_base_freq"] = sliding.rope_theta.into();
        }
    }
}

/// What queries are scaled by the root of, in families that have it, where it is not the head's channels.
fn query_scalar(
    table: &Table<'_>,
    architecture: Architecture,
    head_dim: usize,
) -> Result<Option<f64>> {
    let Some(usual) = architecture.family().query_pre_attn_scalar else { return Ok(None) };
    let scalar = table.number("query_pre_attn_scalar", QUERY_SCALAR)?.unwrap_or(usual);
    Ok(Some(scalar).filter(|&scalar| scalar != head_dim as f64))
}

/// An error for another activation than the family's, under either of its keys.
fn refuse_activation(table: &Table<'_>, architecture: Architecture) -> Result<()> {
    let known = architecture.family().activation_names;
    for key in ["hidden_act", "hidden_activation"] {
        if let Some(name) = table.text(key)?
            && !known.contains(&name)
        {
            return Err(ModelError::Unsupported {
                what: format!("activation \"{name}\" (\"{key}\")"),
                found_in: None,
                hint: format!("supported activations: {}", known[0]),
            });
        }
    }
    Ok(())
}

/// Which projections have biases.
struct Biases {
    attention: bool,
    attention_output: bool,
    mlp: bool,
}

impl Biases {
    fn read(table: &Table<'_>, architecture: Architecture) -> Result<Self> {
        let biased = architecture.family().biased;
        let optional = |key: &str, decides: bool| match table.flag(key)? {
            Some(true) if !decides => Err(ModelError::Unsupported {
                what: format!("\"{key}\": true in a {} model", architecture.model_type()),
                found_in: None,
                hint: format!("this family has no such biases: say \"{key}\": false"),
            }),
            flag => Ok(flag),
        };
        let mlp = optional("mlp_bias", biased.optional_mlp())?.unwrap_or(false);
        if biased == Biased::Qkv {
            // Whatever the keys say.
            table.flag("attention_bias")?;
            return Ok(Self { attention: true, attention_output: false, mlp });
        }
        let decides = biased.optional_attention();
        let attention = optional("attention_bias", decides)?.unwrap_or(false);
        let attention_output = optional(OUTPUT_BIAS, decides)?.unwrap_or(attention);
        Ok(Self { attention, attention_output, mlp })
    }
}
