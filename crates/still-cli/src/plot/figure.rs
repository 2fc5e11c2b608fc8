//! The common parts of charts: frame, axes and formatting of numbers.

use std::fmt::Write as _;

use minijinja::HtmlEscape;

use super::axis::{Axis, Scale};
use super::label::{Anchor, Area};

/// Width of a drawing in its own units; a page may show it at any size.
pub const WIDTH: f64 = 400.0;
/// Where the plotted area begins: the names of the values stand to its left, up to seven characters of them.
pub const LEFT: f64 = 55.0;
/// Where it ends.
pub const RIGHT: f64 = WIDTH - 8.0;
/// Its upper edge.
pub const TOP: f64 = 8.0;

/// Text as it may stand in an element or in a quoted attribute.
pub fn escape(text: &str) -> HtmlEscape<'_> {
    HtmlEscape(text)
}

/// A number in at most four significant digits, in powers of ten where it would be long.
pub fn number(value: f64) -> String {
    number_in(value, 4)
}

/// A number in at most so many significant digits, one less in powers of ten.
fn number_in(value: f64, most: usize) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e5).contains(&size) {
        let text = format!("{value:.*e}", most.saturating_sub(2));
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", trimmed(digits));
    }
    let before = if size < 1.0 { 0 } else { size.log10().floor() as usize + 1 };
    // Zeros behind the point are no significant digits.
    let zeros = if size == 0.0 || size >= 1.0 { 0 } else { (-size.log10()).floor() as usize };
    trimmed(&format!("{value:.*}", most.saturating_sub(before) + zeros)).to_owned()
}

/// Most significant digits of a tick's name.
const MOST_DIGITS: usize = 9;

/// The names of an axis' ticks: as short as [`number`], with more digits where they would not tell the ticks' places.
pub fn tick_names(ticks: &[f64]) -> Vec<String> {
    // How far a tick's neighbor is.
    let room = |n: usize| {
        let neighbors = [n.checked_sub(1), Some(n + 1)].into_iter().flatten();
        let steps = neighbors.filter_map(|other| Some((ticks.get(other)? - ticks[n]).abs()));
        steps.fold(f64::INFINITY, f64::min)
    };
    let tells = |digits: &usize| {
        ticks.iter().enumerate().all(|(n, &tick)| {
            let named: Option<f64> = number_in(tick, *digits).parse().ok();
            named.is_some_and(|named| (named - tick).abs() <= 0.02 * room(n))
        })
    };
    let digits = (4..MOST_DIGITS).find(tells).unwrap_or(MOST_DIGITS);
    ticks.iter().map(|&tick| number_in(tick, digits)).collect()
}

/// Without zeros that say nothing.
fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

/// What the values are, and that their scale is not the usual one.
pub fn about(words: &str, scale: Scale) -> String {
    match scale {
        Scale::Linear => words.to_owned(),
        Scale::Log if words.is_empty() => "logarithmic".into(),
        Scale::Log => format!("{words}, logarithmic"),
    }
}

/// A chart's parts, put together: caption, drawing, and the names of what is drawn.
pub struct Figure<'a> {
    pub title: &'a str,
    /// What the values are, with their unit.
    pub about: &'a str,
    /// Height of the drawing.
    pub height: f64,
    /// Data for the page's script, JSON.
    pub data: Option<String>,
    /// What stands below.
    pub legend: Legend<'a>,
}

/// What the colors mean.
pub enum Legend<'a> {
    /// Class and name of each thing drawn; a single one needs no legend.
    Names(Vec<(String, &'a str)>),
    /// Anything else.
    Html(String),
}

impl Figure<'_> {
    /// The figure around a drawing.
    pub fn around(&self, drawing: &str) -> String {
        let mut html = format!("<figure class=\"chart\"><figcaption>{}", escape(self.title));
        if !self.about.is_empty() {
            let _ = write!(html, " <small>{}</small>", escape(self.about));
        }
        let _ = write!(
            html,
            "</figcaption><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\"",
            self.height,
            escape(self.title)
        );
        if let Some(data) = &self.data {
            let _ = write!(html, " data-chart=\"{}\"", escape(data));
        }
        let _ = write!(html, ">{drawing}</svg>");
        match &self.legend {
            Legend::Html(legend) => html.push_str(legend),
            Legend::Names(names) if names.len() < 2 => {}
            Legend::Names(names) => {
                html.push_str(&keys(names));
            }
        }
        html.push_str("</figure>\n");
        html
    }
}

/// What colors and strokes mean, by class.
fn keys(names: &[(String, &str)]) -> String {
    let key = |(class, name): &(String, &str)| {
        format!("<span><i class=\"{class}\"></i>{}</span>", escape(name))
    };
    format!("<p class=\"keys\">{}</p>", names.iter().map(key).collect::<String>())
}

/// A dashed line across the drawing at a value that the others are compared with, if it has a place.
pub fn level(svg: &mut String, y: &Axis, name: &str, value: f64) {
    if let Some(at) = y.at(value) {
        let tip = format!("{name} {}", number(value));
        let _ = write!(
            svg,
            "<path class=\"level\" data-tip=\"{}\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>",
            escape(&tip)
        );
    }
}

/// Horizontal lines at the named values of `y`, from `LEFT` to `RIGHT`.
pub fn y_axis(svg: &mut String, y: &Axis) {
    let ticks = y.ticks();
    for (&tick, name) in ticks.iter().zip(tick_names(&ticks)) {
        let Some(at) = y.at(tick) else { continue };
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{name}</text>",
            LEFT - 4.0,
            at + 4.0,
        );
    }
}

/// A value's interval: a thin upright line with a bar at either end that has a place.
pub fn whisker(svg: &mut String, x: f64, [low, high]: [f64; 2], y: &Axis) {
    let (Some(low), Some(high)) = (y.at(low), y.at(high)) else { return };
    let (left, right) = (x - 2.5, x + 2.5);
    let _ = write!(
        svg,
        "<path class=\"whisker\" d=\"M{left:.1} {low:.1}H{right:.1}M{x:.1} {low:.1}V{high:.1}M{left:.1} {high:.1}H{right:.1}\"/>"
    );
}

/// A word below the drawing at `x`.
pub fn x_tick(svg: &mut String, x: f64, bottom: f64, text: &str) {
    let _ = write!(
        svg,
        "<text class=\"x\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>",
        bottom + 16.0,
        escape(text)
    );
}

/// Words below the drawing, from left to right; one that would lie on the one before it is left out.
pub fn x_ticks(svg: &mut String, bottom: f64, ticks: impl IntoIterator<Item = (f64, String)>) {
    let mut right = f64::NEG_INFINITY;
    for (x, text) in ticks {
        let area = Area::of_text(&text, Anchor::Middle, x, bottom);
        if area.left >= right + GAP {
            x_tick(svg, x, bottom, &text);
            right = area.right;
        }
    }
}

/// Between two words of a line.
const GAP: f64 = 3.0;

/// What x counts, at the lower right.
pub fn x_name(svg: &mut String, bottom: f64, text: &str) {
    let _ = write!(
        svg,
        "<text class=\"name\" x=\"{RIGHT}\" y=\"{:.1}\">{}</text>",
        bottom + 30.0,
        escape(text)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (12.0, "12"),
            (1234.0, "1234"),
            (99999.0, "99999"),
            (2.5, "2.5"),
            (0.125, "0.125"),
            (0.0123449, "0.01234"),
            (5e-4, "0.0005"),
            (1.5e-5, "1.5e-5"),
            (-3e-9, "-3e-9"),
            (1e6, "1e6"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(number(value), text, "{value}");
        }
    }

    #[test]
    fn ticks_have_the_digits_that_tell_them_apart() {
        assert_eq!(tick_names(&[0.0, 0.5, 1.0]), ["0", "0.5", "1"]);
        assert_eq!(tick_names(&[3.24, 3.2405, 3.241]), ["3.24", "3.2405", "3.241"]);
        assert_eq!(tick_names(&[123_450.0, 123_475.0]), ["1.2345e5", "1.23475e5"]);
        assert_eq!(tick_names(&[2.00001e-5, 2.00002e-5]), ["2.00001e-5", "2.00002e-5"]);
        assert_eq!(tick_names(&[7.0]), ["7"]);
        assert!(tick_names(&[]).is_empty());
    }
}
