//! Bars: a few values for each of many things.

use std::fmt::Write as _;

use super::axis::{Axis, Scale};
use super::figure::{
    Figure, LEFT, Legend, RIGHT, TOP, about, escape, number, whisker, x_name, x_tick, y_axis,
};
use super::label::{LINE, wrapped};

const BOTTOM: f64 = 190.0;
/// Below the plotted area, with one line of names.
const BELOW: f64 = 34.0;
/// Wider bars say no more.
const WIDEST: f64 = 48.0;
/// Names that stand below the bars without touching each other.
const MOST_NAMES: usize = 12;

/// Bars side by side.
#[derive(Clone, Debug, Default)]
pub struct BarChart {
    /// What is shown.
    pub title: String,
    /// What the values are, with their unit.
    pub about: String,
    /// What the categories are.
    pub x: String,
    /// Of the values.
    pub scale: Scale,
    /// Where bars begin on a logarithmic scale: at the lower edge without it. On a linear one they begin at 0.
    pub base: Option<f64>,
    /// Names of the categories.
    pub categories: Vec<String>,
    /// One bar of each for every category.
    pub groups: Vec<Group>,
    /// A value of every category to hold the bars against, dashed, and what it is; what is not finite is left out.
    pub reference: Option<(String, Vec<f64>)>,
}

/// The bars of one color.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name in the legend.
    pub name: String,
    /// One value per category; what is not finite has no bar.
    pub values: Vec<f64>,
    /// Ends of the values' intervals, per category; none if there are none.
    pub intervals: Vec<Option<[f64; 2]>>,
}

impl Group {
    /// The value of a category.
    fn value(&self, category: usize) -> f64 {
        self.values.get(category).copied().unwrap_or(f64::NAN)
    }

    /// The interval of a category's value.
    fn interval(&self, category: usize) -> Option<[f64; 2]> {
        self.intervals.get(category).copied().flatten()
    }
}

impl BarChart {
    /// The figure, as HTML.
    pub fn html(&self) -> String {
        let values = self.groups.iter().flat_map(|group| {
            let ends = group.intervals.iter().flatten().flatten();
            group.values.iter().chain(ends).copied()
        });
        let values = values.chain(self.reference.iter().flat_map(|(_, values)| values.clone()));
        let floor = if self.scale == Scale::Linear { Some(0.0) } else { self.base };
        let y = Axis::over(values, floor, self.scale, (BOTTOM, TOP)).with_margin(0.06);
        let count = self.categories.len().max(1);
        let width = (RIGHT - LEFT) / count as f64;
        let groups = self.groups.len().max(1) as f64;
        let bar = (0.8 * width / groups).min(WIDEST);
        let beside = (width - groups * bar) / 2.0;
        // A name has the room of the categories that it stands for.
        let every = count.div_ceil(MOST_NAMES);
        let room = every as f64 * width - 4.0;
        let names: Vec<Vec<String>> =
            self.categories.iter().step_by(every).map(|name| wrapped(name, room)).collect();
        let lines = names.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let more_lines = (lines - 1) as f64 * LINE;

        let mut svg = String::new();
        y_axis(&mut svg, &y);
        for (n, category) in self.categories.iter().enumerate() {
            let left = LEFT + n as f64 * width;
            let mut tip = format!("{} {category}", self.x);
            for (g, group) in self.groups.iter().enumerate() {
                let (value, interval) = (group.value(n), group.interval(n));
                let _ = write!(tip, "\n{} {}", group.name, number(value));
                if let Some([low, high]) = interval {
                    let _ = write!(tip, " [{}, {}]", number(low), number(high));
                }
                let Some(top) = y.at(value) else { continue };
                let (upper, lower) = (top.min(y.base()), top.max(y.base()));
                let _ = write!(
                    svg,
                    "<rect class=\"s{}\" x=\"{:.1}\" y=\"{upper:.1}\" width=\"{bar:.1}\" height=\"{:.1}\"/>",
                    g % 6,
                    left + beside + g as f64 * bar,
                    lower - upper
                );
                if let Some(interval) = interval {
                    whisker(&mut svg, left + beside + (g as f64 + 0.5) * bar, interval, &y);
                }
            }
            if let Some((name, values)) = &self.reference {
                let value = values.get(n).copied().unwrap_or(f64::NAN);
                if let Some(at) = y.at(value) {
                    let _ = write!(tip, "\n{name} {}", number(value));
                    let right = left + width;
                    let _ =
                        write!(svg, "<path class=\"mark\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>");
                }
            }
            let _ = write!(
                svg,
                "<rect class=\"touch\" data-tip=\"{}\" x=\"{left:.1}\" y=\"{TOP}\" width=\"{width:.1}\" height=\"{}\"/>",
                escape(&tip),
                BOTTOM - TOP
            );
        }
        for (n, lines) in names.iter().enumerate() {
            let middle = LEFT + ((n * every) as f64 + 0.5) * width;
            for (l, line) in lines.iter().enumerate() {
                x_tick(&mut svg, middle, BOTTOM + l as f64 * LINE, line);
            }
        }
        x_name(&mut svg, BOTTOM + more_lines, &self.x);
        let legend = self.groups.iter().enumerate();
        let legend = legend.map(|(g, group)| (format!("s{}", g % 6), group.name.as_str()));
        Figure {
            title: &self.title,
            about: &about(&self.about, self.scale),
            height: BOTTOM + BELOW + more_lines,
            data: None,
            legend: Legend::Names(legend.collect()),
        }
        .around(&svg)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::label::{assert_readable, words_of};

    fn chart(scale: Scale) -> String {
        BarChart {
            title: "t".into(),
            x: "layer".into(),
            scale,
            categories: vec!["<0>".into(), "1".into()],
            groups: vec![
                Group {
                    name: "first".into(),
                    values: vec![1.0, 2.0],
                    intervals: vec![None, Some([1.5, 2.25])],
                },
                Group { name: "last".into(), values: vec![0.5, f64::NAN], intervals: vec![] },
            ],
            reference: Some(("chance".into(), vec![0.25, f64::NAN])),
            ..BarChart::default()
        }
        .html()
    }

    fn bar_heights(html: &str) -> Vec<f64> {
        let bars = html.split("<rect class=\"s").skip(1);
        let height = |bar: &str| bar.split("height=\"").nth(1)?.split('"').next()?.parse().ok();
        bars.map(|bar| height(bar).unwrap()).collect()
    }

    #[test]
    fn a_bar_for_each_finite_value() {
        for scale in [Scale::Linear, Scale::Log] {
            let html = chart(scale);
            assert_eq!(html.matches("<rect class=\"s0\"").count(), 2, "{html}");
            assert_eq!(html.matches("<rect class=\"s1\"").count(), 1, "{html}");
            assert!(!html.contains("NaN") && !html.contains("<0>"), "{html}");
            assert!(html.contains("layer 1\nfirst 2 [1.5, 2.25]\nlast –"), "{html}");
            assert!(html.contains("last 0.5\nchance 0.25\""), "{html}");
            assert_eq!(html.matches("class=\"whisker\"").count(), 1, "{html}");
            assert_eq!(html.matches("class=\"mark\"").count(), 1, "{html}");
        }
    }

    #[test]
    fn intervals_fit_into_the_chart() {
        let html = chart(Scale::Linear);
        let path = html.split("class=\"whisker\" d=\"M").nth(1).unwrap();
        let places: Vec<f64> = path[..path.find('"').unwrap()]
            .split(['M', 'V', 'H', ' '])
            .filter_map(|number| number.parse().ok())
            .collect();
        assert!(places.iter().all(|place| place.is_finite() && *place >= TOP), "{path}");
    }

    #[test]
    fn linear_bars_stand_on_zero() {
        let html = chart(Scale::Linear);
        let heights = bar_heights(&html);
        // In the order they are drawn: 1, 0.5, 2.
        assert!((heights[0] / heights[2] - 0.5).abs() < 0.01, "{heights:?}");
        assert!((heights[1] / heights[2] - 0.25).abs() < 0.01, "{heights:?}");
    }

    #[test]
    fn logarithmic_bars_stand_on_their_base() {
        let html = BarChart {
            scale: Scale::Log,
            base: Some(1.0),
            categories: vec!["repeated_text_4096".into()],
            groups: [1e1, 1e2, 1e6]
                .map(|value| Group { name: String::new(), values: vec![value], intervals: vec![] })
                .into(),
            ..BarChart::default()
        }
        .html();
        let heights = bar_heights(&html);
        // As 1 to 2 to 6: equal factors, equal heights.
        assert!((heights[1] / heights[0] - 2.0).abs() < 0.01, "{heights:?}");
        assert!((heights[2] / heights[0] - 6.0).abs() < 0.02, "{heights:?}");
        let first = words_of(&html).into_iter().find(|(class, ..)| class == "y").unwrap();
        assert_eq!(first.1, "1", "the axis begins at the base: {html}");
    }

    #[test]
    fn names_do_not_lie_on_each_other_and_none_is_cut() {
        let long = [
            "niah_multivalue_131072",
            "repeated_text_4096",
            "lambada_openai",
            "wwwwwwwwwwwwwwwwww",
        ];
        for count in [1, 2, 4, 12, 30] {
            let categories: Vec<String> = (0..count).map(|n| long[n % 4].to_owned()).collect();
            let values = vec![1.0; count];
            let group = Group { name: "m".into(), values, intervals: vec![] };
            let (x, groups) = ("task".to_owned(), vec![group]);
            let html = BarChart { x, categories, groups, ..BarChart::default() }.html();
            assert_readable(&html);
            let words = words_of(&html);
            let shown: String =
                words.iter().filter(|word| word.0 == "x").map(|word| word.1.as_str()).collect();
            assert!(shown.starts_with("niah_multivalue_131072"), "{count}: {shown}");
        }
    }

    #[test]
    fn lone_bars_are_no_walls() {
        let group = Group { name: "m".into(), values: vec![3.0], intervals: vec![] };
        let (categories, groups) = (vec!["piqa".to_owned()], vec![group]);
        let html = BarChart { categories, groups, ..BarChart::default() }.html();
        assert!(html.contains("x=\"199.5\"") && html.contains("width=\"48.0\""), "{html}");
    }
}
