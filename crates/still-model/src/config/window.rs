//! Attention that does not reach everything before: refused, but in families whose students keep such layers.

use super::family::WindowKey;
use super::read::Table;
use super::{Architecture, MAX_POSITIONS, ModelConfig};
use crate::error::{ModelError, Result};

/// `sliding_window` of a configuration that leaves it out.
const WINDOW: usize = 4096;
/// `max_window_layers` of a configuration that leaves it out.
const FULL_LAYERS: usize = 28;

/// An error if some layer attends to a window that is shorter than the context, by Hugging Face's rules.
///
/// A student takes over a teacher's attention to everything before; one that sees only a window has none to take over.
pub(super) fn refuse(table: &Table<'_>, config: &ModelConfig) -> Result<()> {
    let window = table.size("sliding_window", 0..=MAX_POSITIONS)?;
    let family = config.architecture.family();
    let window = match family.window {
        WindowKey::Window(default) if !table.mentions("sliding_window") => default,
        WindowKey::Window(_) => window,
        _ if table.mentions("sliding_window") => window,
        _ => Some(WINDOW),
    };
    let windowed = table.flag("use_sliding_window")?.unwrap_or(false);
    let full_layers = table.size("max_window_layers", 0..=MAX_POSITIONS)?.unwrap_or(FULL_LAYERS);
    if matches!(family.window, WindowKey::Pattern { .. }) {
        return Ok(());
    }
    let by_type = layer_types(table, config.architecture, config.num_hidden_layers)?;
    let by_type = by_type.is_some_and(|layers| layers.contains(&true));
    let key = match family.window {
        // The key means nothing in such a family.
        WindowKey::None if windowed => "use_sliding_window",
        WindowKey::Window(_) => "sliding_window",
        WindowKey::ByLayer if by_type => "layer_types",
        WindowKey::ByLayer if windowed && full_layers < config.num_hidden_layers => {
            "use_sliding_window"
        }
        WindowKey::None | WindowKey::ByLayer | WindowKey::Pattern { .. } => return Ok(()),
    };
    let context = config.max_position_embeddings;
    match window {
        Some(window) if window < context => Err(ModelError::Unsupported {
            what: format!(
                "a {} model whose attention is a sliding window of {window} tokens (\"{key}\"), shorter than its \
                 context of {context},",
                config.architecture.model_type()
            ),
            found_in: None,
            hint: "linearizing replaces attention to the whole context, which this model does not have: use a \
                   version without a window (of Mistral 7B: v0.2 or later), or lower max_position_embeddings to \
                   the window and stay within it"
                .into(),
        }),
        _ => Ok(()),
    }
}

/// The window and the layers that have it, of a family whose students keep such layers; `None` if no layer has one.
pub(super) fn sliding(
    table: &Table<'_>,
    architecture: Architecture,
    num_layers: usize,
) -> Result<Option<(usize, Vec<bool>)>> {
    let WindowKey::Pattern { window, period } = architecture.family().window else {
        return Ok(None);
    };
    let period = table.size("sliding_window_pattern", 1..=MAX_POSITIONS)?.unwrap_or(period);
    let layers = layer_types(table, architecture, num_layers)?
        .unwrap_or_else(|| pattern(num_layers, period));
    if !layers.contains(&true) {
        return Ok(None);
    }
    match table.size("sliding_window", 1..=MAX_POSITIONS)? {
        Some(window) => Ok(Some((window, layers))),
        None if table.mentions("sliding_window") => Err(table.missing("sliding_window")),
        None => Ok(Some((window, layers))),
    }
}

/// Every layer but each `period`-th has a window.
pub(crate) fn pattern(num_layers: usize, period: usize) -> Vec<bool> {
    (1..=num_layers).map(|layer| !layer.is_multiple_of(period)).collect()
}

/// Which layers have a window, where `layer_types` says it.
fn layer_types(
    table: &Table<'_>,
    architecture: Architecture,
    num_layers: usize,
) -> Result<Option<Vec<bool>>> {
    const KEY: &str = "layer_types";
    let Some(types) = table.texts(KEY)? else { return Ok(None) };
    if types.len() != num_layers {
        return Err(ModelError::Invalid(format!(
            "\"{KEY}\" names {} layers, \"num_hidden_layers\" is {num_layers}",
            types.len(),
        )));
    }
    let sliding = match architecture.family().window {
        WindowKey::ByLayer | WindowKey::Pattern { .. } => true,
        WindowKey::None | WindowKey::Window(_) => false,
    };
    let known = |kind: &str| kind == "full_attention" || (sliding && kind == "sliding_attention");
    match types.iter().find(|kind| !known(kind)) {
        Some(kind) => Err(ModelError::Unsupported {
            what: format!("a layer of the kind \"{kind}\" (\"{KEY}\")"),
            found_in: None,
            hint: "supported: full_attention in every layer".into(),
        }),
        None => Ok(Some(types.iter().map(|kind| *kind == "sliding_attention").collect())),
    }
}
