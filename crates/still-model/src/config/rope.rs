//! RoPE's parameters, where Hugging Face's files have them: one table (`rope_parameters`, or `rope_scaling` as it was called),
//! perhaps one such table for each kind of layer, and older keys beside it.

use serde_json::{Value, json};

use super::read::Table;
use super::{Architecture, MAX_POSITIONS, ROPE_THETA};
use crate::error::{ModelError, Result};

/// What a configuration that leaves it out means.
const DEFAULT_THETA: f64 = 10_000.0;
/// Of the factors of a scaling.
const FACTOR: std::ops::RangeInclusive<f64> = 1e-3..=1e6;
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
    /// Every frequency divided by its own number, as in GGUF's `rope_freqs`: `[head_dim / 2]`.
    Factors(Vec<f64>),
}

/// `rope_theta` and the scaling.
pub(super) type Rope = (f64, Option<RopeScaling>);

/// Reads RoPE's parameters; `context` is `max_position_embeddings`.
///
/// The order is that of transformers 5: `rope_scaling` if it has entries, else `rope_parameters`; what these tables say of
/// theta precedes the key outside.
///
/// # Errors
/// A value of the wrong type or range, a kind of scaling that is not computed here, keys that contradict each other.
pub(super) fn read(config: &Table<'_>, architecture: Architecture, context: usize) -> Result<Rope> {
    let qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
    let outside = Outside {
        kinds: qwen || config.value("layer_types").is_some(),
        theta: config.number("rope_theta", ROPE_THETA)?,
        original: config.size("original_max_position_embeddings", 1..=MAX_POSITIONS)?,
        context,
    };
    for key in ["partial_rotary_factor", "rotary_pct", "rotary_percent"] {
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
        [] => Ok((outside.theta.unwrap_or(DEFAULT_THETA), None)),
        [(_, ref rope)] => Ok(rope.clone()),
        [(_, ref a), (_, ref b), ..] if a == b => Ok(a.clone()),
        [(a, _), (b, _), ..] => Err(ModelError::Invalid(format!(
            "\"{a}\" and \"{b}\" describe two different rotations: keep the one that the model was trained with"
        ))),
    }
}

/// Writes what [`read`] reads beside `rope_theta`.
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
    }
}

impl RopeScaling {
    /// Checks that the numbers fit each other and heads of `head_dim` channels.
    pub(super) fn validate(&self, head_dim: usize) -> Result<()> {
        match self {
            Self::Factors(factors) if factors.len() != head_dim / 2 => {
                Err(ModelError::Invalid(format!(
                    "the rope scaling has {} factors for the {} frequencies of a head",
                    factors.len(),
                    head_dim / 2
                )))
            }
            Self::Factors(factors) => {
                match factors.iter().find(|factor| !FACTOR.contains(factor)) {
                    None => Ok(()),
                    Some(factor) => Err(out_of_range(*factor)),
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

/// What stands beside the tables.
struct Outside {
    /// Whether the layers have kinds, so that tables can be theirs.
    kinds: bool,
    theta: Option<f64>,
    original: Option<usize>,
    context: usize,
}

/// A table's parameters, or those that its tables by kind of layer agree on.
fn of_all_layers(table: &Table<'_>, outside: &Outside) -> Result<Rope> {
    let kinds: Vec<&str> = table.keys().filter(|key| LAYER_KINDS.contains(key)).collect();
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

fn of_table(table: &Table<'_>, outside: &Outside) -> Result<Rope> {
    let theta = table.number("rope_theta", ROPE_THETA)?.or(outside.theta);
    let theta = theta.unwrap_or(DEFAULT_THETA);
    whole_heads(table, "partial_rotary_factor")?;
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
    let factor = table.number("factor", FACTOR)?;
    let low_freq_factor = table.number("low_freq_factor", FACTOR)?;
    let high_freq_factor = table.number("high_freq_factor", FACTOR)?;
    let original = table.size("original_max_position_embeddings", 1..=MAX_POSITIONS)?;
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
        Some("llama3") => {
            let original = match (original, outside.original) {
                (Some(a), Some(b)) if a != b => {
                    return Err(ModelError::Invalid(format!(
                        "\"{}\" is {a}, outside it stands {b}",
                        table.path("original_max_position_embeddings")
                    )));
                }
                (inside, outside) => inside.or(outside),
            };
            Some(RopeScaling::Llama3 {
                factor: needed("factor", factor)?,
                low_freq_factor: needed("low_freq_factor", low_freq_factor)?,
                high_freq_factor: needed("high_freq_factor", high_freq_factor)?,
                original_max_position_embeddings: original.unwrap_or(outside.context),
            })
        }
        Some("longrope") => Some(RopeScaling::Factors(one_set_of_factors(table)?)),
        Some(other) => {
            return Err(ModelError::Unsupported {
                what: format!("rope scaling \"{other}\""),
                found_in: None,
                hint: "supported: default, linear, llama3".into(),
            });
        }
    };
    // These tables are small: a key that is not known here is part of some other rotation.
    let of_factors: &[&str] = match scaling {
        Some(RopeScaling::Factors(_)) => &["short_factor", "long_factor", "attention_factor"],
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
        return Err(table.unsupported(key, "supported rotations: default, linear, llama3"));
    }
    Ok((theta, scaling))
}

/// Factors of one rotation for every context, which leaves attention's logits as they are.
fn one_set_of_factors(table: &Table<'_>) -> Result<Vec<f64>> {
    let short = table.numbers("short_factor", FACTOR)?;
    let long = table.numbers("long_factor", FACTOR)?;
    // Without it, it follows from the contexts' lengths.
    let attention = table.number("attention_factor", FACTOR)?;
    match short {
        Some(factors) if long.as_ref() == Some(&factors) && attention == Some(1.0) => Ok(factors),
        _ => Err(ModelError::Unsupported {
            what: "rope scaling \"longrope\" of more than one set of factors".into(),
            found_in: None,
            hint: "supported: default, linear, llama3; longrope where short_factor and long_factor are the same and \
                   attention_factor is 1"
                .into(),
        }),
    }
}

/// An error if a part of each head is not rotated.
fn whole_heads(table: &Table<'_>, key: &str) -> Result<()> {
    match table.number(key, 0.0..=1.0)? {
        None | Some(1.0) => Ok(()),
        Some(_) => Err(table.unsupported(key, "supported: 1, every channel of a head is rotated")),
    }
}
