//! Attention in a sliding window, as llama.cpp reads it.

use std::path::Path;

use super::config::round_f32;
use super::metadata::Metadata;
use super::unsupported;
use crate::config::{Architecture, SlidingAttention, WindowKey, window_pattern};
use crate::error::Result;

/// The layers with a window, in a family whose students keep such layers; in others an error if a window is shorter than the
/// context.
pub(super) fn sliding(
    path: &Path,
    metadata: &Metadata<'_>,
    architecture: Architecture,
    name: &str,
    (layers, context): (usize, usize),
) -> Result<Option<SlidingAttention>> {
    let key = format!("{name}.attention.sliding_window");
    let window = metadata.integer(&key, 0..=u32::MAX)?.unwrap_or(0) as usize;
    let family = architecture.family();
    let (WindowKey::Pattern { period, .. }, Some(theta)) = (family.window, family.local_rope_theta)
    else {
        refuse(path, &key, window, context)?;
        return Ok(None);
    };
    if window == 0 {
        return Ok(None);
    }
    let key = format!("{name}.attention.sliding_window_pattern");
    let layers = match metadata.flags(&key, layers)? {
        Some(layers) => layers,
        None => window_pattern(layers, metadata.size(&key)?.unwrap_or(period)),
    };
    let mut rope_theta = theta;
    for key in ["rope.local.freq_base", "rope.freq_base_swa"].map(|key| format!("{name}.{key}")) {
        match metadata.float(&key)? {
            None => {}
            Some(theta) if theta > 0.0 => rope_theta = round_f32(theta),
            Some(_) => return Err(metadata.refuse(&key, "expected a number above 0")),
        }
    }
    let some = layers.contains(&true);
    Ok(some.then_some(SlidingAttention { window, layers, rope_theta }))
}

fn refuse(path: &Path, key: &str, window: usize, context: usize) -> Result<()> {
    if window == 0 || window >= context {
        return Ok(());
    }
    Err(unsupported(
        path,
        format!(
            "attention in a sliding window of {window} tokens ({key}), shorter than the context of {context},"
        ),
        "linearizing replaces attention to the whole context, which this model does not have: use a version \
         without a window",
    ))
}
