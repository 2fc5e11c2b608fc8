//! A value for each pair of things, as a shade.

use std::fmt::Write as _;

use super::axis::Scale;
use super::figure::{Figure, LEFT, Legend, RIGHT, TOP, about, escape, number, x_name, x_tick};

/// Names along an axis that do not touch each other.
const MOST_NAMES: usize = 12;
/// Width of a cell that has room for its value.
const ROOM_FOR_A_VALUE: f64 = 22.0;

/// Shaded cells.
#[derive(Clone, Debug, Default)]
pub struct Heatmap {
    /// What is shown.
    pub title: String,
    /// What the values are, with their unit.
    pub about: String,
    /// What the columns are.
    pub x: String,
    /// What the rows are.
    pub y: String,
    /// `[column][row]`; columns may differ in length.
    pub columns: Vec<Vec<f64>>,
    /// The value without shade.
    pub low: f64,
    /// The value with the deepest shade.
    pub high: f64,
    /// Of the shades. On a logarithmic one the least positive value has almost none, and `low` plays no part.
    pub scale: Scale,
}

/// On a linear scale, a value that is so many times the median has all the shade.
const SATURATING: f64 = 20.0;

impl Heatmap {
    /// Logarithmic if the largest value would leave the others without shade.
    pub fn fitting(columns: &[Vec<f64>]) -> Scale {
        let mut values: Vec<f64> = columns.iter().flatten().copied().filter(|v| *v > 0.0).collect();
        values.sort_by(f64::total_cmp);
        let saturates = |&high: &f64| high > SATURATING * values[values.len() / 2];
        if values.last().is_some_and(saturates) { Scale::Log } else { Scale::Linear }
    }

    /// Depth of a value's shade, 0 to 1. What is not finite has none.
    fn depth(&self, value: f64, least: f64) -> f64 {
        let depth = match self.scale {
            Scale::Linear if self.high > self.low => (value - self.low) / (self.high - self.low),
            Scale::Linear => value - self.low,
            Scale::Log if value <= 0.0 => 0.0,
            Scale::Log if self.high > least => {
                FAINT + (1.0 - FAINT) * (value / least).ln() / (self.high / least).ln()
            }
            Scale::Log => 1.0,
        };
        if depth.is_finite() { depth.clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// From this depth on, black letters are read more easily than white ones in the page's dark theme.
const DEEP: f64 = 0.6;
/// Of the least positive value on a logarithmic scale: 0 has less.
const FAINT: f64 = 0.05;

impl Heatmap {
    /// The figure, as HTML.
    pub fn html(&self) -> String {
        let rows = self.columns.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let count = self.columns.len().max(1);
        let width = (RIGHT - LEFT) / count as f64;
        let height = (160.0 / rows as f64).clamp(5.0, 24.0);
        let bottom = TOP + rows as f64 * height;
        let positive = self.columns.iter().flatten().copied().filter(|value| *value > 0.0);
        let least = positive.fold(f64::INFINITY, f64::min);

        let mut svg = String::new();
        for (c, column) in self.columns.iter().enumerate() {
            let left = LEFT + c as f64 * width;
            for (r, &value) in column.iter().enumerate() {
                let top = TOP + r as f64 * height;
                let level = self.depth(value, least);
                let tip = format!("{} {c}, {} {r}: {}", self.x, self.y, number(value));
                let _ = write!(
                    svg,
                    "<rect class=\"cell\" data-tip=\"{}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" style=\"--level:{:.3}\"/>",
                    escape(&tip),
                    0.08 + 0.92 * level
                );
                if width >= ROOM_FOR_A_VALUE && height >= 14.0 {
                    let _ = write!(
                        svg,
                        "<text class=\"value{}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                        if level > DEEP { " deep" } else { "" },
                        left + width / 2.0,
                        top + height / 2.0 + 4.0,
                        number(value)
                    );
                }
            }
            if c % count.div_ceil(MOST_NAMES) == 0 {
                x_tick(&mut svg, left + width / 2.0, bottom, &c.to_string());
            }
        }
        let every = rows.div_ceil(MOST_NAMES);
        for r in (0..rows).step_by(every) {
            let _ = write!(
                svg,
                "<text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{r}</text>",
                LEFT - 4.0,
                TOP + (r as f64 + 0.5) * height + 4.0
            );
        }
        x_name(&mut svg, bottom, &format!("{} →  {} ↓", self.x, self.y));
        let ramp = format!(
            "<p class=\"keys\"><span>{}<i class=\"ramp\"></i>{}</span></p>",
            number(if self.scale == Scale::Log && least.is_finite() { least } else { self.low }),
            number(self.high)
        );
        Figure {
            title: &self.title,
            about: &about(&self.about, self.scale),
            height: bottom + 34.0,
            data: None,
            legend: Legend::Html(ramp),
        }
        .around(&svg)
    }
}

/// What a heatmap of a model's heads, a column a layer, is about: with what its empty columns are, if it has any.
pub fn about_layers(about: &str, columns: &[Vec<f64>]) -> String {
    match columns.iter().any(Vec::is_empty) {
        false => about.into(),
        true => format!("{about}; layers without cells keep their attention to a window"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_there_and_shaded() {
        let html = Heatmap {
            title: "<b>".into(),
            x: "layer".into(),
            y: "head".into(),
            columns: vec![vec![0.0, 64.0], vec![4.0], vec![f64::NAN, 8.0]],
            high: 64.0,
            ..Heatmap::default()
        }
        .html();
        assert_eq!(html.matches("class=\"cell\"").count(), 5, "{html}");
        assert!(html.contains("layer 0, head 1: 64\"") && html.contains("--level:1.000"), "{html}");
        assert!(!html.contains("<b>") && !html.contains("NaN"), "{html}");
    }

    #[test]
    fn one_large_value_takes_no_shade_from_the_others() {
        let columns = vec![vec![0.0, 0.001, 0.001], vec![0.01, 0.001, 10.0]];
        assert_eq!(Heatmap::fitting(&columns), Scale::Log);
        assert_eq!(Heatmap::fitting(&[vec![1.0, 2.0, 19.0]]), Scale::Linear);
        assert_eq!(Heatmap::fitting(&[vec![0.0, f64::NAN]]), Scale::Linear);
        let map = Heatmap { columns, high: 10.0, scale: Scale::Log, ..Heatmap::default() };
        let depth = |value| map.depth(value, 0.001);
        assert_eq!([depth(0.0), depth(-1.0), depth(f64::NAN)], [0.0; 3]);
        assert!(depth(0.001) > 0.0 && (depth(10.0) - 1.0).abs() < 1e-9);
        assert!(depth(0.01) - depth(0.001) > 0.2, "a decade of four is seen");
        let html = map.html();
        assert!(html.contains("logarithmic") && html.contains("0.001<i class=\"ramp\""), "{html}");
    }

    #[test]
    fn nothing_is_an_empty_frame() {
        let html = Heatmap::default().html();
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
    }
}
