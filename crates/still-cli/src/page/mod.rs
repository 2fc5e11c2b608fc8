//! What every HTML page of ours shares, so that all look alike: each is one file that asks for nothing from outside.
//!
//! A page's template extends `base.html`, the frame, and fills in its blocks: `title`, `heading`, `about` (what the page is of),
//! `content`, and where it needs them `style`, `data` and `script`. `parts.html` has macros for charts and tables. The frame
//! shows `figures`, pairs of a name and a value, if a page has them.

use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

/// The frame.
const BASE: &str = include_str!("base.html");

/// Macros of several pages.
const PARTS: &str = include_str!("parts.html");

/// Colours for light and dark, text, tables and the charts of [`crate::plot`].
const STYLE: &str = include_str!("style.css");

/// The button with the id `theme`; a page that draws by script redraws on the event `theme`.
const THEME: &str = include_str!("theme.js");

/// Shows in the element `tip` what the pointer is over in the charts of [`crate::plot`], on pages without a script of their own.
const HOVER: &str = include_str!("hover.js");

/// Fills in a page's template with `data`.
///
/// # Errors
/// If the template cannot be filled in, which would be a defect.
pub fn render(template: &str, data: impl Serialize) -> anyhow::Result<String> {
    let mut environment = Environment::new();
    // Whatever is not marked as safe in the template is text.
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_template("base.html", BASE)?;
    environment.add_template("parts.html", PARTS)?;
    let shared = context! {
        style => STYLE,
        theme => THEME,
        hover => HOVER,
        version => env!("CARGO_PKG_VERSION"),
    };
    Ok(environment.render_str(template, context! { ..Value::from_serialize(data), ..shared })?)
}
