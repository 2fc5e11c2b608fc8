//! RoPE's parameters, where Hugging Face's files have them: one table (`rope_parameters`, or `rope_scaling` as it was called),
//! perhaps one such table for each kind of layer, and older keys next to it.

use serde_json::{Value, json};

use super::family::WindowKey;
use super::read::Table;
use super::{Architecture, MAX_POSITIONS, ROPE_THETA, ROTARY_FACTOR};
use crate::error::{ModelError, Result};

/// Of the factors of a scaling.
const FACTOR: std::ops::RangeInclusive<f64> = 1e-3..=1e6;
/// Tokens that sequences have at most, for rotations that depend on it. The key is ours: transformers decides anew with every call.
const DECLARED_LENGTH: &str = "declared_length";
/// Names of tables by kind of layer.
const LAYER_KINDS: [&str; 3] = ["full_attention", "sliding_attention", "chunked_attention"];

/// How RoPE's frequencies are stretched beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Tokens of the original context.
        original_max_position_embeddings: usize,
    },
    /// Every frequency divided by its own number, as in GGUF's `rope_freqs`: `[rotary_dim / 2]`.
    Factors(Vec<f64>),
    /// Phi-3's: every frequency divided by its own number, of one of two sets. Which one is decided once, by the length that
    /// sequences are declared to have at most, so that every split of a sequence gives the same.
    LongRope {
        /// For sequences within the original context: `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// For longer ones.
        long_factor: Vec<f64>,
        /// What rotated queries and keys are multiplied by.
        attention_factor: f64,
        /// Tokens of the original context.
        original_max_position_embeddings: usize,
        /// Tokens that sequences have at most.
        declared_length: usize,
    },
}

/// What a configuration says of RoPE.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rope {
    pub theta: f64,
    pub scaling: Option<RopeScaling>,
    /// `partial_rotary_factor`
    pub partial: f64,
    /// The base of layers with a sliding window, in families where they have one of their own.
    pub local_theta: Option<f64>,
}

/// Reads RoPE's parameters; `context` is `max_position_embeddings`.
///
/// The order is that of transformers 5: `rope_scaling` if it has entries, else `rope_parameters`; what these tables say of
/// theta precedes the key outside.
///
/// # Errors
/// A value of the wrong type or range, a kind of scaling that is not computed here, keys that contradict each other.
pub(super) fn read(config: &Table<'_>, architecture: Architecture, context: usize) -> Result<Rope> {
    let family = architecture.family();
    let by_layer = family.window == WindowKey::ByLayer;
    let outside = Outside {
        kinds: by_layer || config.value("layer_types").is_some(),
        theta: config.number("rope_theta", ROPE_THETA)?.unwrap_or(family.rope_theta),
        local_theta: match family.local_rope_theta {
            Some(default) => {
                Some(config.number("rope_local_base_freq", ROPE_THETA)?.unwrap_or(default))
            }
            None => None,
        },
        original: config.size("original_max_position_embeddings", 1..=MAX_POSITIONS)?,
        context,
        partial: rotary_factor(config, "partial_rotary_factor", architecture)?,
        architecture,
    };
    for key in ["rotary_pct", "rotary_percent"] {
        whole_heads(config, key)?;
    }
    let mut found: Vec<(&str, Rope)> = Vec::new();
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(table) = config.table(key)? else { continue };
        if table.keys().next().is_some() {
            found.push((key, of_all_layers(&table, &outside)?));
        }
    }
    match found[..] {
        [] => Ok(outside.unscaled()),
        [(_, ref rope)] => Ok(rope.clone()),
        [(_, ref a), (_, ref b), ..] if a == b => Ok(a.clone()),
        [(a, _), (b, _), ..] => Err(ModelError::Invalid(format!(
            "\"{a}\" and \"{b}\" describe two different rotations: keep the one that the model was trained with"
        ))),
    }
}

/// Writes what [`read`] reads besides `rope_theta`.
pub(super) fn to_json(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        // The form of transformers that holds such numbers: the same ones for short and long contexts.
        RopeScaling::Factors(factors) => json!({
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
        }),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            attention_factor,
            original_max_position_embeddings,
            declared_length,
        } => json!({
            "rope_type": "longrope",
            "short_factor": short_factor,
            "long_factor": long_factor,
            "attention_factor": attention_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            DECLARED_LENGTH: declared_length,
        }),
    }
}

impl RopeScaling {
    /// Checks that the numbers fit each other and heads of which `rotary_dim` channels are rotated.
    pub(super) fn validate(&self, rotary_dim: usize) -> Result<()> {
        let one_each = |factors: &[f64]| {
            if factors.len() != rotary_dim / 2 {
                return Err(ModelError::Invalid(format!(
                    "the rope scaling has {} factors for the {} frequencies of a head",
                    factors.len(),
                    rotary_dim / 2
                )));
            }
            match factors.iter().find(|factor| !FACTOR.contains(factor)) {
                None => Ok(()),
                Some(factor) => Err(out_of_range(*factor)),
            }
        };
        match self {
            Self::Factors(factors) => one_each(factors),
            Self::LongRope { short_factor, long_factor, attention_factor, .. } => {
                one_each(short_factor)?;
                one_each(long_factor)?;
                match FACTOR.contains(attention_factor) {
                    true => Ok(()),
                    false => Err(out_of_range(*attention_factor)),
                }
            }
            Self::Linear { factor } | Self::Llama3 { factor, .. } if !FACTOR.contains(factor) => {
                Err(out_of_range(*factor))
            }
            Self::Llama3 { low_freq_factor, high_freq_factor, .. }
                if low_freq_factor.partial_cmp(high_freq_factor)
                    != Some(std::cmp::Ordering::Less) =>
            {
                Err(ModelError::Invalid(format!(
                    "the rope scaling's low_freq_factor {low_freq_factor} is not below its high_freq_factor \
                     {high_freq_factor}"
                )))
            }
            _ => Ok(()),
        }
    }
}

fn out_of_range(factor: f64) -> ModelError {
    ModelError::Invalid(format!(
        "the rope scaling's factor is {factor}, expected a number from {} to {}",
        FACTOR.start(),
        FACTOR.end()
    ))
}

/// What stands next to the tables.
struct Outside {
    /// Whether the layers have kinds, so that tables can be theirs.
    kinds: bool,
    theta: f64,
    local_theta: Option<f64>,
    original: Option<usize>,
    context: usize,
    partial: Option<f64>,
    architecture: Architecture,
}

impl Outside {
    fn unscaled(&self) -> Rope {
        Rope {
            theta: self.theta,
            scaling: None,
            partial: self.partial.unwrap_or(1.0),
            local_theta: self.local_theta,
        }
    }
}

/// A table's parameters, or those that its tables by kind of layer agree on.
fn of_all_layers(table: &Table<'_>, outside: &Outside) -> Result<Rope> {
    let kinds: Vec<&str> = table.keys().filter(|key| LAYER_KINDS.contains(key)).collect();
    if let (Some(local), false) = (outside.local_theta, kinds.is_empty()) {
        return by_kind(table, local, outside);
    }
    let mut ropes = Vec::new();
    for kind in &kinds {
        let Some(inner) = table.table(kind)? else { continue };
        ropes.push(of_table(&inner, outside)?);
    }
    let Some(first) = ropes.first().cloned() else { return of_table(table, outside) };
    if !outside.kinds {
        // transformers passes over such tables and takes the default.
        return Err(table.unsupported(
            kinds[0],
            "tables by kind of layer need \"layer_types\": or write one table for all",
        ));
    }
    if let Some(key) = table.keys().find(|key| !LAYER_KINDS.contains(key)) {
        return Err(ModelError::Invalid(format!(
            "\"{}\" holds both tables by kind of layer ({}) and \"{key}\" beside them",
            table.name(),
            kinds.join(", ")
        )));
    }
    if ropes.iter().all(|rope| *rope == first) {
        return Ok(first);
    }
    Err(ModelError::Unsupported {
        what: format!(
            "a rotation that differs by layer (\"{}\": {})",
            table.name(),
            kinds.join(", ")
        ),
        found_in: None,
        hint: "supported: one rotation for all layers".into(),
    })
}

/// The parameters of a table that has one for each of two kinds of layers.
fn by_kind(table: &Table<'_>, local_theta: f64, outside: &Outside) -> Result<Rope> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    if let Some(key) = table.keys().find(|key| ![FULL, SLIDING].contains(key)) {
        return Err(table.unsupported(key, format!("supported tables: {FULL}, {SLIDING}")));
    }
    let of_layers = |key: &str, theta: f64| match table.table(key)? {
        Some(inner) => of_table(&inner, &Outside { theta, ..*outside }),
        None => Ok(Outside { theta, ..*outside }.unscaled()),
    };
    let (full, local) = (of_layers(FULL, outside.theta)?, of_layers(SLIDING, local_theta)?);
    if local.scaling.is_some() {
        return Err(table.unsupported(
            SLIDING,
            "supported: layers with a sliding window have a rotation that is not scaled",
        ));
    }
    Ok(Rope { local_theta: Some(local.theta), ..full })
}

fn of_table(table: &Table<'_>, outside: &Outside) -> Result<Rope> {
    let theta = table.number("rope_theta", ROPE_THETA)?.unwrap_or(outside.theta);
    let partial = rotary_factor(table, "partial_rotary_factor", outside.architecture)?;
    let partial = partial.or(outside.partial).unwrap_or(1.0);
    let kind = kind(table, outside.architecture)?;
    let factor = table.number("factor", FACTOR)?;
    let low_freq_factor = table.number("low_freq_factor", FACTOR)?;
    let high_freq_factor = table.number("high_freq_factor", FACTOR)?;
    let original = original_length(table, outside.original)?;
    let needed = |key: &str, value: Option<f64>| value.ok_or_else(|| table.missing(key));
    let scaling = match kind {
        // A scaling that does not say how it scales: transformers 4 stops, transformers 5 forgets the factor.
        None | Some("default") if factor.is_some_and(|factor| factor != 1.0) => {
            let kind = kind
                .map_or("no \"rope_type\"".to_owned(), |kind| format!("the rope_type \"{kind}\""));
            return Err(ModelError::Invalid(format!(
                "\"{}\" is {} with {kind}, which has no factor: say \"linear\" if that is what is meant",
                table.path("factor"),
                factor.unwrap_or_default()
            )));
        }
        None | Some("default") => None,
        Some("linear") => Some(RopeScaling::Linear { factor: needed("factor", factor)? }),
        Some("llama3") => Some(RopeScaling::Llama3 {
            factor: needed("factor", factor)?,
            low_freq_factor: needed("low_freq_factor", low_freq_factor)?,
            high_freq_factor: needed("high_freq_factor", high_freq_factor)?,
            original_max_position_embeddings: original.unwrap_or(outside.context),
        }),
        Some("longrope") => Some(long_rope(table, original, factor, outside.context)?),
        Some(other) => {
            return Err(ModelError::Unsupported {
                what: format!("rope scaling \"{other}\""),
                found_in: None,
                hint: "supported: default, linear, llama3, longrope".into(),
            });
        }
    };
    check_keys(table, scaling.as_ref())?;
    Ok(Rope { theta, scaling, partial, local_theta: outside.local_theta })
}

/// Which rotation, by its newer or its older key.
fn kind<'a>(table: &Table<'a>, architecture: Architecture) -> Result<Option<&'a str>> {
    let kind = match (table.text("rope_type")?, table.text("type")?) {
        (Some(a), Some(b)) if a != b => {
            return Err(ModelError::Invalid(format!(
                "\"{}\" is \"{a}\" and \"{}\" is \"{b}\": which of them is meant?",
                table.path("rope_type"),
                table.path("type")
            )));
        }
        (kind, old) => kind.or(old),
    };
    // What it was called in Phi-3's first files.
    Ok(kind.map(|kind| match kind {
        "su" if architecture.family().partial_rotation => "longrope",
        other => other,
    }))
}

/// The context that the model was first trained on, which may stand outside the table, too.
fn original_length(table: &Table<'_>, outside: Option<usize>) -> Result<Option<usize>> {
    let inside = table.size("original_max_position_embeddings", 1..=MAX_POSITIONS)?;
    match (inside, outside) {
        (Some(a), Some(b)) if a != b => Err(ModelError::Invalid(format!(
            "\"{}\" is {a}, outside it stands {b}",
            table.path("original_max_position_embeddings")
        ))),
        (inside, outside) => Ok(inside.or(outside)),
    }
}

/// These tables are small: a key that is not known here is part of some other rotation.
fn check_keys(table: &Table<'_>, scaling: Option<&RopeScaling>) -> Result<()> {
    let of_factors: &[&str] = match scaling {
        Some(RopeScaling::Factors(_) | RopeScaling::LongRope { .. }) => {
            &["short_factor", "long_factor", "attention_factor", DECLARED_LENGTH]
        }
        _ => &[],
    };
    const KNOWN: [&str; 9] = [
        "rope_theta",
        "rope_type",
        "type",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        // Of the first YaRN checkpoints; says how a model was made.
        "finetuned",
    ];
    if let Some(key) = table.keys().find(|key| !KNOWN.contains(key) && !of_factors.contains(key)) {
        return Err(
            table.unsupported(key, "supported rotations: default, linear, llama3, longrope")
        );
    }
    Ok(())
}

/// Phi-3's rotation; one set of factors for every context if both are the same and change no logits.
fn long_rope(
    table: &Table<'_>,
    original: Option<usize>,
    factor: Option<f64>,
    context: usize,
) -> Result<RopeScaling> {
    let needed = |key: &str| {
        table.numbers(key, FACTOR)?.ok_or_else(|| {
            let key = table.path(key);
            ModelError::Invalid(format!("a rope scaling \"longrope\" without \"{key}\""))
        })
    };
    let (short_factor, long_factor) = (needed("short_factor")?, needed("long_factor")?);
    let given = table.number("attention_factor", FACTOR)?;
    if short_factor == long_factor && given == Some(1.0) {
        return Ok(RopeScaling::Factors(short_factor));
    }
    let original_max_position_embeddings = original.unwrap_or(context);
    let attention_factor = given.unwrap_or_else(|| {
        // As in transformers: where the context is longer than the original one, by how much.
        let original = original_max_position_embeddings as f64;
        let factor = factor.unwrap_or(context as f64 / original);
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
    });
    let declared = table.size(DECLARED_LENGTH, 1..=MAX_POSITIONS)?;
    Ok(RopeScaling::LongRope {
        short_factor,
        long_factor,
        attention_factor,
        original_max_position_embeddings,
        declared_length: declared.unwrap_or(context),
    })
}

/// The share of each head that is rotated, where the family has such a share.
fn rotary_factor(table: &Table<'_>, key: &str, architecture: Architecture) -> Result<Option<f64>> {
    if architecture.family().partial_rotation {
        return table.number(key, ROTARY_FACTOR);
    }
    whole_heads(table, key)?;
    Ok(None)
}

/// An error if a part of each head is not rotated.
fn whole_heads(table: &Table<'_>, key: &str) -> Result<()> {
    match table.number(key, 0.0..=1.0)? {
        None | Some(1.0) => Ok(()),
        Some(_) => Err(table.unsupported(key, "supported: 1, every channel of a head is rotated")),
    }
}
