//! Charts as HTML figures around inline SVG. They know numbers and words, not what is plotted, and give text.
//!
//! A chart is complete without a script: axes, curves, legend. What the pointer shows is left to the page's script
//! ([`crate::page::SCRIPT`]), which reads the `data-` attributes that are written here. Colours are the page's, by class
//! ([`crate::page::STYLE`]). Whatever text comes in is escaped.

mod axis;
mod bars;
mod figure;
mod heatmap;
mod label;
mod line;
mod scatter;

pub use axis::Scale;
pub use bars::{BarChart, Group};
pub use figure::number;
pub use heatmap::Heatmap;
pub use line::{LineChart, Mark, Series, Stroke};
pub use scatter::{Dot, Scatter};
