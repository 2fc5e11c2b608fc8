//! Charts as HTML figures around inline SVG. They know numbers and words, not what is plotted, and return text.
//!
//! A chart is complete without a script: axes, curves, legend. The page's script (`page/hover.js`) shows values under the
//! pointer, from the `data-` attributes that charts write. Colors are the page's, by class (`page/style.css`), and so follow
//! its light and dark theme. All text that comes in is escaped.
//!
//! # Why not a crate
//!
//! Two curves of 600 points on one chart, release builds on two cores, 2026-11-29; binaries are stripped, and compared with
//! a program that writes the points as text:
//!
//! | | plotters 0.3 (SVG backend) | charming 0.6 | this module |
//! |---|---|---|---|
//! | crates it adds, CPU time to build them | 5, 4.4 s | 49, 66 s | 0 |
//! | bytes of the binary | 0.10 MB | 1.18 MB | under 0.07 MB |
//! | the chart | 31 KB of SVG | 82 KB of HTML and JSON | 15 KB of SVG, 47 KB of values for the pointer |
//! | script in a page that loads nothing | none | 1.12 MB (ECharts 6.1) | 2 KB (`hover.js`) |
//! | values under the pointer | no | yes | yes |
//! | colors by theme | no: each shape has its color | by script | yes |
//! | the chart without a script | yes | no | yes |
//!
//! plotters leaves hover, themes, legends in HTML and labels that avoid each other to its user. charming's pages load
//! ECharts from a server or carry it; here the pages of a small run and of a small evaluation take 23 and 59 KB.

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
pub use heatmap::{Heatmap, about_layers};
pub use line::{LineChart, Mark, Series, Stroke};
pub use scatter::{Dot, Scatter};
