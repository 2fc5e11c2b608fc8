//! What every HTML page of ours shares, so that all look alike: each is one file that asks for nothing from outside.

use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

/// Colours for light and dark, text, tables and the charts of [`crate::plot`].
pub const STYLE: &str = include_str!("style.css");

/// The button with the id `theme`; a page that draws by script redraws on the event `theme`.
pub const THEME: &str = include_str!("theme.js");

/// Shows in the element `tip` what the pointer is over in the charts of [`crate::plot`].
pub const SCRIPT: &str = include_str!("charts.js");

/// Fills in a page's template: `data`, with `style`, `version`, and `script` for a page of charts.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(template: &str, data: impl Serialize) -> anyhow::Result<String> {
    let mut environment = Environment::new();
    // Whatever is not marked as safe in the template is text.
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    let shared = context! {
        style => STYLE,
        script => format!("{THEME}{SCRIPT}"),
        version => env!("CARGO_PKG_VERSION"),
    };
    Ok(environment.render_str(template, context! { ..Value::from_serialize(data), ..shared })?)
}
