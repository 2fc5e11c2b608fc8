//! RoPE's base and scaling, as llama.cpp reads them.

use std::fs::File;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;

use super::config::round_f32;
use super::metadata::Metadata;
use super::unsupported;
use crate::config::RopeScaling;
use crate::error::{ModelError, Result};

/// A number for each frequency of a head; files of Llama 3.1 and later have it.
pub(super) const FACTORS: &str = "rope_freqs.weight";

/// The frequencies' base and what they are divided by.
pub(super) fn rope(
    path: &Path,
    content: &Content,
    metadata: &Metadata<'_>,
    name: &str,
    head_dim: usize,
) -> Result<(f64, Option<RopeScaling>)> {
    let of = |key: &str| format!("{name}.rope.{key}");
    let key = of("dimension_count");
    if metadata.size(&key)?.is_some_and(|rotated| rotated != head_dim) {
        let what = format!("rotation of a part of each head ({key}, of {head_dim} channels)");
        return Err(unsupported(path, what, "use a model that rotates whole heads"));
    }
    let key = of("freq_base");
    let theta = match metadata.float(&key)? {
        None => 10_000.0,
        Some(theta) if theta > 0.0 => round_f32(theta),
        Some(_) => return Err(metadata.refuse(&key, "expected a number above 0")),
    };
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
    Ok((theta, factors(path, content, head_dim, factor)?.or(linear)))
}

/// What frequencies are divided by where the file has a number for each, on top of one for all.
fn factors(
    path: &Path,
    content: &Content,
    head_dim: usize,
    of_all: f64,
) -> Result<Option<RopeScaling>> {
    let Some(info) = content.tensor_infos.get(FACTORS) else { return Ok(None) };
    let wrong = |what| ModelError::corrupt(path, format!("tensor {FACTORS} {what}"));
    if info.shape.dims() != [head_dim / 2] {
        let (found, half) = (info.shape.dims(), head_dim / 2);
        return Err(wrong(format!(
            "has shape {found:?}, heads of {head_dim} channels need [{half}]"
        )));
    }
    let mut file = File::open(path).map_err(ModelError::read(path))?;
    let tensor = content.tensor(&mut file, FACTORS, &Device::Cpu)?.dequantize(&Device::Cpu)?;
    let factors = tensor.to_vec1::<f32>()?;
    if let Some(factor) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
        return Err(wrong(format!("has the factor {factor}")));
    }
    let factors = factors.into_iter().map(|factor| f64::from(factor) * of_all).collect();
    Ok(Some(RopeScaling::Factors(factors)))
}
