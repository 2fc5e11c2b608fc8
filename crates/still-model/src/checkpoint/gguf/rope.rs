//! RoPE's base and scaling, as llama.cpp reads them.

use std::fs::File;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;

use super::config::round_f32;
use super::metadata::Metadata;
use super::unsupported;
use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::error::{ModelError, Result};

/// A number for each frequency of a head; files of Llama 3.1 and later have it.
const FACTORS: &str = "rope_freqs.weight";
/// Phi-3's two sets, for sequences within the original context and for longer ones.
const SHORT_FACTORS: &str = "rope_factors_short.weight";
const LONG_FACTORS: &str = "rope_factors_long.weight";

/// RoPE as a file has it: theta, scaling, and the share of each head that is rotated.
pub(super) struct Rope {
    pub theta: f64,
    pub scaling: Option<RopeScaling>,
    pub partial_rotary_factor: f64,
}

/// Tensors of factors that such a model's file may have.
pub(super) fn factor_tensors(config: &ModelConfig) -> impl Iterator<Item = &'static str> {
    let family = config.architecture.family();
    let of_llama = family.interleaved_in_gguf.then_some(FACTORS);
    let long = matches!(config.rope_scaling, Some(RopeScaling::LongRope { .. }));
    let of_phi = [SHORT_FACTORS, LONG_FACTORS].into_iter().filter(move |_| long);
    of_llama.into_iter().chain(of_phi)
}

/// RoPE's parameters; `context` is the file's context length.
pub(super) fn rope(
    path: &Path,
    content: &Content,
    metadata: &Metadata<'_>,
    architecture: Architecture,
    (head_dim, context): (usize, usize),
) -> Result<Rope> {
    let name = architecture.gguf_name();
    let of = |key: &str| format!("{name}.rope.{key}");
    let key = of("dimension_count");
    let rotated = metadata.size(&key)?.unwrap_or(head_dim);
    let partial = architecture.family().partial_rotation && (1..=head_dim).contains(&rotated);
    if rotated != head_dim && !partial {
        let what = format!("rotation of a part of each head ({key}, of {head_dim} channels)");
        return Err(unsupported(path, what, "use a model that rotates whole heads"));
    }
    let partial_rotary_factor = rotated as f64 / head_dim as f64;
    let key = of("freq_base");
    let theta = match metadata.float(&key)? {
        None => 10_000.0,
        Some(theta) if theta > 0.0 => round_f32(theta),
        Some(_) => return Err(metadata.refuse(&key, "expected a number above 0")),
    };
    if let Some(scaling) = long_rope(path, content, metadata, architecture, (rotated, context))? {
        return Ok(Rope { theta, scaling: Some(scaling), partial_rotary_factor });
    }
    for (key, neutral) in [("scaling.attn_factor", 1.0), ("scaling.alpha", 0.0)] {
        let key = of(key);
        if metadata.float(&key)?.is_some_and(|factor| factor != neutral) {
            let what = format!("a model with {key}");
            return Err(unsupported(path, what, "use a model that computes without it"));
        }
    }

    // Without a type a factor is linear. The older name counts where the newer one is missing.
    let kind = metadata.text(&of("scaling.type"))?.unwrap_or("linear");
    let mut factor = 1.0;
    for key in ["scale_linear", "scaling.factor"].map(of) {
        match metadata.float(&key)? {
            None => {}
            Some(0.0) => factor = 1.0,
            Some(given) if given > 0.0 => factor = given,
            Some(_) => return Err(metadata.refuse(&key, "expected a number above 0")),
        }
    }
    let factor = match kind {
        "none" => 1.0,
        "linear" => factor,
        other => {
            return Err(unsupported(
                path,
                format!("rope scaling {other:?} ({})", of("scaling.type")),
                "supported in GGUF: none, linear and the factors of a rope_freqs tensor",
            ));
        }
    };
    let linear = (factor != 1.0).then_some(RopeScaling::Linear { factor });
    let scaling = factors(path, content, rotated, factor)?.or(linear);
    Ok(Rope { theta, scaling, partial_rotary_factor })
}

/// Phi-3's rotation, if the file has its factors.
fn long_rope(
    path: &Path,
    content: &Content,
    metadata: &Metadata<'_>,
    architecture: Architecture,
    (rotated, context): (usize, usize),
) -> Result<Option<RopeScaling>> {
    if !architecture.family().partial_rotation {
        return Ok(None);
    }
    let read = |name: &str| factor_values(path, content, name, rotated);
    let (short_factor, long_factor) = match (read(SHORT_FACTORS)?, read(LONG_FACTORS)?) {
        (None, None) => return Ok(None),
        (Some(short), Some(long)) => (short, long),
        _ => {
            let what = format!("has one of {SHORT_FACTORS} and {LONG_FACTORS}, not both");
            return Err(ModelError::corrupt(path, what));
        }
    };
    let of = |key: &str| format!("{}.rope.{key}", architecture.gguf_name());
    let key = of("scaling.original_context_length");
    let original = metadata.size(&key)?.filter(|&original| original > 1).unwrap_or(context);
    let key = of("scaling.attn_factor");
    let attention_factor = match metadata.float(&key)? {
        // As transformers computes it.
        None if context > original => {
            (1.0 + (context as f64 / original as f64).ln() / (original as f64).ln()).sqrt()
        }
        None => 1.0,
        Some(factor) if factor > 0.0 => factor,
        Some(_) => return Err(metadata.refuse(&key, "expected a number above 0")),
    };
    Ok(Some(RopeScaling::LongRope {
        short_factor,
        long_factor,
        attention_factor,
        original_max_position_embeddings: original,
        declared_length: context,
    }))
}

/// What frequencies are divided by where the file has a number for each, on top of one for all.
fn factors(
    path: &Path,
    content: &Content,
    rotated: usize,
    of_all: f64,
) -> Result<Option<RopeScaling>> {
    let factors = factor_values(path, content, FACTORS, rotated)?;
    let scaled = |factors: Vec<f64>| factors.into_iter().map(|factor| factor * of_all).collect();
    Ok(factors.map(|factors| RopeScaling::Factors(scaled(factors))))
}

/// The values of a tensor of factors, if there is one.
fn factor_values(
    path: &Path,
    content: &Content,
    name: &str,
    rotated: usize,
) -> Result<Option<Vec<f64>>> {
    let Some(info) = content.tensor_infos.get(name) else { return Ok(None) };
    let wrong = |what| ModelError::corrupt(path, format!("tensor {name} {what}"));
    if info.shape.dims() != [rotated / 2] {
        let (found, half) = (info.shape.dims(), rotated / 2);
        return Err(wrong(format!(
            "has shape {found:?}, heads of {rotated} channels need [{half}]"
        )));
    }
    let mut file = File::open(path).map_err(ModelError::read(path))?;
    let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
    let factors = tensor.to_vec1::<f32>()?;
    if let Some(factor) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
        return Err(wrong(format!("has the factor {factor}")));
    }
    Ok(Some(factors.into_iter().map(f64::from).collect()))
}
