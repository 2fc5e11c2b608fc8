//! Curves over a common x.

use std::fmt::Write as _;

use serde_json::json;

use super::axis::{Axis, Scale};
use super::figure::{
    Figure, LEFT, Legend, RIGHT, TOP, about, escape, level, tick_names, whisker, x_name, x_ticks,
    y_axis,
};

const BOTTOM: f64 = 190.0;
const HEIGHT: f64 = 224.0;
/// Points of a curve that are drawn; more could not be told apart.
const MOST_POINTS: usize = 600;

/// Curves, one below the other's color.
#[derive(Clone, Debug, Default)]
pub struct LineChart {
    /// What is shown.
    pub title: String,
    /// What y is, with its unit.
    pub about: String,
    /// What x counts.
    pub x: String,
    /// Of y.
    pub scale: Scale,
    /// Of x. On a logarithmic one every x that has room has its name: it is for few.
    pub x_scale: Scale,
    /// The curves.
    pub series: Vec<Series>,
    /// Places on x to point out.
    pub marks: Vec<Mark>,
    /// A y to hold the curves against, dashed, and what it is.
    pub reference: Option<(String, f64)>,
    /// Values of y that are shown whatever the curves are, such as both ends of a share.
    pub ends: Vec<f64>,
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// x and y, by rising x. A y that is not finite interrupts the curve.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub stroke: Stroke,
    /// Ends of the intervals of the points' y; none if there are none.
    pub intervals: Vec<Option<[f64; 2]>>,
}

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stroke {
    /// A line.
    #[default]
    Line,
    /// A pale line, behind what matters more; it takes the color of the next curve.
    Pale,
    /// A line with a dot at each point, for few points.
    Dots,
}

/// A place on x.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Where.
    pub x: f64,
    /// What is there.
    pub label: String,
}

impl Series {
    /// Every y of it: of its points and of the ends of their intervals.
    pub fn ys(&self) -> impl Iterator<Item = f64> {
        let ends = self.intervals.iter().flatten().flatten().copied();
        self.points.iter().map(|point| point.1).chain(ends)
    }
}

impl LineChart {
    /// The figure, as HTML.
    pub fn html(&self) -> String {
        let xs = self.series.iter().flat_map(|series| series.points.iter().map(|point| point.0));
        let xs: Vec<f64> = xs.chain(self.marks.iter().map(|mark| mark.x)).collect();
        // Where every x has its name, the first and the last one's need room.
        let room = if self.x_scale == Scale::Log { 18.0 } else { 6.0 };
        let x = Axis::over(xs.iter().copied(), None, self.x_scale, (LEFT + room, RIGHT - room));
        let ys = self.series.iter().flat_map(Series::ys);
        let ys = ys.chain(self.reference.iter().map(|(_, y)| *y)).chain(self.ends.iter().copied());
        let y = Axis::over(ys, None, self.scale, (BOTTOM, TOP)).with_margin(0.06);

        let mut svg = String::new();
        y_axis(&mut svg, &y);
        let ticks = match self.x_scale {
            Scale::Linear => x.ticks(),
            Scale::Log => distinct(xs),
        };
        let named = ticks.iter().zip(tick_names(&ticks));
        let placed = named.filter_map(|(&tick, name)| Some((x.at(tick)?, name)));
        x_ticks(&mut svg, BOTTOM, placed);
        x_name(&mut svg, BOTTOM, &self.x);
        for mark in &self.marks {
            let Some(at) = x.at(mark.x) else { continue };
            let _ = write!(
                svg,
                "<path class=\"mark\" data-tip=\"{}\" d=\"M{at:.1} {TOP}V{BOTTOM}\"/>",
                escape(&mark.label)
            );
        }
        if let Some((name, value)) = &self.reference {
            level(&mut svg, &y, name, *value);
        }
        let mut data = Vec::new();
        let mut legend = Vec::new();
        let mut color = 0;
        for series in &self.series {
            let class = format!("s{}{}", color % 6, series.stroke.class());
            let points = thinned(&series.points, MOST_POINTS);
            draw(&mut svg, &class, series.stroke, &points, &x, &y);
            for (point, interval) in series.points.iter().zip(&series.intervals) {
                if let (Some(at), Some(interval)) = (x.at(point.0), interval) {
                    whisker(&mut svg, at, *interval, &y);
                }
            }
            let placed = |&(at, value): &(f64, f64)| {
                Some(json!([tenth(x.at(at)?), tenth(y.at(value)?), at, value]))
            };
            data.push(json!({
                "name": series.name,
                "points": points.iter().filter_map(placed).collect::<Vec<_>>(),
            }));
            legend.push((class, series.name.as_str()));
            color += usize::from(series.stroke != Stroke::Pale);
        }
        if let Some((name, _)) = &self.reference {
            legend.push(("dashed".into(), name.as_str()));
        }
        Figure {
            title: &self.title,
            about: &about(&self.about, self.scale),
            height: HEIGHT,
            data: Some(json!({ "x": self.x, "series": data }).to_string()),
            legend: Legend::Names(legend),
        }
        .around(&svg)
    }
}

impl Stroke {
    fn class(self) -> &'static str {
        match self {
            Self::Pale => " pale",
            Self::Line | Self::Dots => "",
        }
    }
}

fn draw(svg: &mut String, class: &str, stroke: Stroke, points: &[(f64, f64)], x: &Axis, y: &Axis) {
    let placed: Vec<Option<(f64, f64)>> =
        points.iter().map(|&(at, value)| Some((x.at(at)?, y.at(value)?))).collect();
    let mut path = String::new();
    let mut dots = String::new();
    for run in placed.split(Option::is_none) {
        let alone = run.len() == 1;
        for (n, (x, y)) in run.iter().flatten().enumerate() {
            let _ = write!(path, "{}{x:.1} {y:.1}", if n == 0 { 'M' } else { 'L' });
            if alone || stroke == Stroke::Dots {
                let _ =
                    write!(dots, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
            }
        }
    }
    if !path.is_empty() {
        let _ = write!(svg, "<path class=\"curve {class}\" d=\"{path}\"/>{dots}");
    }
}

/// Ascending, each once.
fn distinct(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.dedup();
    values
}

fn tenth(value: f64) -> f64 {
    (10.0 * value).round() / 10.0
}

/// At most about `most` of the points: of each stretch the lowest and the highest, so that no spike is lost, and what
/// interrupts the curve.
fn thinned(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(most / 2);
    let mut kept = Vec::new();
    for part in points.chunks(stretch) {
        let finite = || (0..part.len()).filter(|&n| part[n].1.is_finite());
        let lowest = finite().min_by(|&a, &b| part[a].1.total_cmp(&part[b].1));
        let highest = finite().max_by(|&a, &b| part[a].1.total_cmp(&part[b].1));
        let broken = part.iter().position(|point| !point.1.is_finite());
        let mut chosen: Vec<usize> = [lowest, highest, broken].into_iter().flatten().collect();
        chosen.sort_unstable();
        chosen.dedup();
        kept.extend(chosen.into_iter().map(|n| part[n]));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::label::{assert_readable, words_of};

    fn chart(points: &[(f64, f64)]) -> LineChart {
        LineChart {
            title: "loss <of> \"a\" & 'b'".into(),
            about: "nats".into(),
            x: "step".into(),
            series: vec![Series {
                name: "</svg><script>".into(),
                points: points.to_vec(),
                stroke: Stroke::Line,
                intervals: vec![],
            }],
            ..LineChart::default()
        }
    }

    #[test]
    fn text_is_escaped_everywhere() {
        let mut chart = chart(&[(1.0, 2.0), (2.0, 1.0)]);
        chart.series.push(chart.series[0].clone());
        chart.marks.push(Mark { x: 1.0, label: "\" onload=\"x".into() });
        chart.x = "<step>".into();
        let html = chart.html();
        for raw in ["<script", "<of>", "\" onload=\"x", "<step>", "& '"] {
            assert!(!html.contains(raw), "{raw} in {html}");
        }
        assert!(html.contains("&lt;script&gt;") && html.contains("&lt;step&gt;"), "{html}");
    }

    #[test]
    fn gaps_interrupt_the_curve() {
        let html = chart(&[(1.0, 1.0), (2.0, 2.0), (3.0, f64::NAN), (4.0, 3.0)]).html();
        let path = html.split("class=\"curve s0\" d=\"").nth(1).unwrap();
        assert_eq!(path.split('"').next().unwrap().matches('M').count(), 2, "{html}");
        // The lone point behind the gap would be invisible as a line.
        assert_eq!(html.matches("<circle").count(), 1, "{html}");
    }

    #[test]
    fn no_points_give_an_empty_frame() {
        let html = chart(&[]).html();
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        assert!(!html.contains("curve"), "{html}");
    }

    #[test]
    fn lengths_are_named_on_a_logarithmic_axis() {
        let mut chart = chart(&[(1024.0, 3.0), (4096.0, 2.5), (16384.0, 2.0)]);
        chart.x_scale = Scale::Log;
        chart.series[0].intervals = vec![Some([2.75, 9.0]), None, Some([f64::NAN, 2.0])];
        let html = chart.html();
        for length in ["1024", "4096", "16384"] {
            assert!(html.contains(&format!(">{length}</text>")), "no {length} in {html}");
        }
        // An end that is no number has no place.
        assert_eq!(html.matches("class=\"whisker\"").count(), 1, "{html}");
        // Equal factors, equal distances.
        assert!(html.contains("M73.0 ") && html.contains("L223.5 "), "{html}");
    }

    #[test]
    fn a_reference_is_drawn_named_and_in_the_picture() {
        let mut chart = chart(&[(1.0, 2.0), (2.0, 1.5)]);
        let heights = |html: &str| html.matches("class=\"level\"").count();
        assert_eq!(heights(&chart.html()), 0);
        chart.reference = Some(("<teacher>".into(), 0.5));
        let html = chart.html();
        assert_eq!(heights(&html), 1, "{html}");
        assert!(html.contains("<i class=\"dashed\"></i>&lt;teacher&gt;</span>"), "{html}");
        let at: f64 = html
            .split("class=\"level\"")
            .nth(1)
            .unwrap()
            .split("d=\"M55 ")
            .nth(1)
            .unwrap()
            .split('H')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!((TOP..=BOTTOM).contains(&at), "{at}");
        chart.reference = Some(("teacher".into(), f64::NAN));
        assert_eq!(heights(&chart.html()), 0);
    }

    #[test]
    fn names_of_near_lengths_do_not_lie_on_each_other() {
        let lengths = [1000.0, 1024.0, 2048.0, 4096.0, 16384.0, 32768.0, 65536.0, 131_072.0];
        let mut chart = chart(&lengths.map(|length| (length, 2.0 + length)));
        (chart.x_scale, chart.scale) = (Scale::Log, Scale::Log);
        let html = chart.html();
        assert_readable(&html);
        let names = words_of(&html).into_iter().filter(|(class, ..)| class == "x").count();
        assert_eq!(names, 7, "all but 1024: {html}");
    }

    #[test]
    fn thinning_keeps_spikes_and_gaps() {
        let mut points: Vec<(f64, f64)> = (0..5000).map(|n| (f64::from(n), 1.0)).collect();
        points[1234].1 = 99.0;
        points[4321].1 = f64::NAN;
        let thin = thinned(&points, 600);
        assert!(thin.len() <= 902, "{}", thin.len());
        assert!(thin.contains(&(1234.0, 99.0)));
        assert!(thin.iter().any(|point| point.1.is_nan()));
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
