//! Checks that there is memory for a timing, because a failed allocation ends the process.

use still_attention::{HeadGeometry, RowDtype};
use still_model::{Model, ModelConfig};
use still_train::free_memory_bytes;

use crate::errors::user;
use crate::table;

/// Bytes of an activation on the CPU.
const F32: u64 = 4;

/// An error unless a context fits: its activations, and the cache of dense attention. A student's cache grows more slowly, and is
/// not counted.
///
/// # Errors
/// How much is needed and how much is there.
pub fn check(
    model: &Model,
    batch: usize,
    context: usize,
    new_tokens: usize,
    rows: RowDtype,
) -> anyhow::Result<()> {
    if !model.device().is_cpu() {
        return Ok(());
    }
    let sequences = batch as u64;
    let tokens = sequences.saturating_mul(context as u64);
    let config = model.config();
    let activations = match batch {
        // Read in blocks: ids, and nothing else of that length.
        1 => tokens.saturating_mul(F32),
        _ => tokens.saturating_mul(per_token(config)),
    };
    let kept = context.saturating_add(new_tokens);
    let cache = match model.student {
        None => sequences.saturating_mul(config.dense_cache_bytes(kept, rows)),
        Some(_) => 0,
    };
    enough(activations.saturating_add(cache), batch, context)
}

/// The same of one operator: queries, keys and values, their gradients, the output and its gradient.
///
/// # Errors
/// As [`check`].
pub fn check_operator(geometry: HeadGeometry, batch: usize, context: usize) -> anyhow::Result<()> {
    let (heads, kv_heads) = (geometry.num_heads as u64, geometry.num_key_value_heads as u64);
    let values = (4 * heads + 4 * kv_heads).saturating_mul(geometry.head_dim as u64);
    let tokens = (batch as u64).saturating_mul(context as u64);
    enough(tokens.saturating_mul(values).saturating_mul(F32), batch, context)
}

/// Of all tokens at once: hidden states before and after a layer, their norm, and queries, keys and values before and after the
/// rotation.
fn per_token(config: &ModelConfig) -> u64 {
    let heads = config.num_attention_heads as u64 + 2 * config.num_key_value_heads as u64;
    F32 * (3 * config.hidden_size as u64 + 2 * heads * config.head_dim as u64)
}

fn enough(needed: u64, batch: usize, context: usize) -> anyhow::Result<()> {
    match free_memory_bytes() {
        Some(free) if needed > free => {
            let size = |bytes: u64| table::bytes(usize::try_from(bytes).unwrap_or(usize::MAX));
            Err(user(
                format!(
                    "{batch} sequences of {context} tokens need about {} of memory, and {} are free",
                    size(needed),
                    size(free)
                ),
                "lower --batch or --contexts",
            ))
        }
        _ => Ok(()),
    }
}
