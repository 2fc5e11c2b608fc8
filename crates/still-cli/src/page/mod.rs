//! What every HTML page of ours shares, so that all look alike: each is one file that asks for nothing from outside.

/// Colours for light and dark, text, tables and the charts of [`crate::plot`].
pub const STYLE: &str = include_str!("style.css");

/// The button with the id `theme`; a page that draws by script redraws on the event `theme`.
pub const THEME: &str = include_str!("theme.js");

/// Shows in the element `tip` what the pointer is over in the charts of [`crate::plot`].
pub const SCRIPT: &str = include_str!("charts.js");
