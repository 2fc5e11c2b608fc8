//! Dots with names: one value against another.

use std::fmt::Write as _;

use super::axis::{Axis, Scale};
use super::figure::{
    Figure, LEFT, Legend, RIGHT, TOP, about, escape, number, whisker, x_name, x_tick, y_axis,
};

const BOTTOM: f64 = 190.0;
const HEIGHT: f64 = 224.0;
/// Between two names, so that they can be read.
const LINE: f64 = 11.0;

/// Named dots.
#[derive(Clone, Debug, Default)]
pub struct Scatter {
    /// What is shown.
    pub title: String,
    /// What y is, with its unit.
    pub about: String,
    /// What x is, with its unit.
    pub x: String,
    /// Of y.
    pub scale: Scale,
    /// Of x.
    pub x_scale: Scale,
    /// The dots.
    pub dots: Vec<Dot>,
    /// A y to hold the dots against, dashed, and what it is.
    pub reference: Option<(String, f64)>,
}

/// One dot.
#[derive(Clone, Debug)]
pub struct Dot {
    /// What it is.
    pub name: String,
    /// Its name is written beside it; a dot without is pale.
    pub named: bool,
    /// Which of the page's colours.
    pub colour: usize,
    /// Where; a dot whose place is not finite is left out.
    pub x: f64,
    /// Where.
    pub y: f64,
    /// Ends of the interval of y.
    pub interval: Option<[f64; 2]>,
}

impl Scatter {
    /// The figure, as HTML.
    pub fn html(&self) -> String {
        let xs = self.dots.iter().map(|dot| dot.x);
        let x = Axis::over(xs, None, self.x_scale, (LEFT + 8.0, RIGHT - 8.0)).with_margin(0.08);
        let ys = self.dots.iter().flat_map(|dot| {
            let ends = dot.interval.into_iter().flatten();
            std::iter::once(dot.y).chain(ends)
        });
        let ys = ys.chain(self.reference.iter().map(|(_, y)| *y));
        let y = Axis::over(ys, None, self.scale, (BOTTOM, TOP)).with_margin(0.08);

        let mut svg = String::new();
        y_axis(&mut svg, &y);
        for tick in x.ticks() {
            if let Some(at) = x.at(tick) {
                x_tick(&mut svg, at, BOTTOM, &number(tick));
            }
        }
        x_name(&mut svg, BOTTOM, &about(&self.x, self.x_scale));
        if let Some((name, value)) = &self.reference
            && let Some(at) = y.at(*value)
        {
            let tip = format!("{name} {}", number(*value));
            let _ = write!(
                svg,
                "<path class=\"mark\" data-tip=\"{}\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>",
                escape(&tip)
            );
        }
        let mut placed: Vec<(&Dot, f64, f64)> =
            self.dots.iter().filter_map(|dot| Some((dot, x.at(dot.x)?, y.at(dot.y)?))).collect();
        // From above, so that a name that is in the way of another moves down.
        placed.sort_by(|a, b| a.2.total_cmp(&b.2));
        let mut names: Vec<(bool, f64)> = Vec::new();
        for (dot, at, height) in placed {
            self.draw(&mut svg, dot, (at, height), &y);
            if !dot.named {
                continue;
            }
            let left = at > f64::midpoint(LEFT, RIGHT);
            let own = names.iter().filter(|(side, _)| *side == left).map(|(_, place)| place + LINE);
            let place = own.fold(height + 4.0, f64::max);
            names.push((left, place));
            let (class, from) = if left { ("name", at - 7.0) } else { ("beside", at + 7.0) };
            let _ = write!(
                svg,
                "<text class=\"{class}\" x=\"{from:.1}\" y=\"{place:.1}\">{}</text>",
                escape(&shortened(&dot.name))
            );
        }
        Figure {
            title: &self.title,
            about: &about(&self.about, self.scale),
            height: HEIGHT,
            data: None,
            legend: Legend::Names(Vec::new()),
        }
        .around(&svg)
    }

    fn draw(&self, svg: &mut String, dot: &Dot, (at, height): (f64, f64), y: &Axis) {
        let mut tip = format!("{}\n{} {}", dot.name, self.x, number(dot.x));
        let _ = write!(tip, "\n{} {}", self.title, number(dot.y));
        if let Some([low, high]) = dot.interval {
            whisker(svg, at, [low, high], y);
            let _ = write!(tip, " [{}, {}]", number(low), number(high));
        }
        let _ = write!(
            svg,
            "<circle class=\"s{}{}\" data-tip=\"{}\" cx=\"{at:.1}\" cy=\"{height:.1}\" r=\"4\"/>",
            dot.colour % 6,
            if dot.named { "" } else { " pale" },
            escape(&tip)
        );
    }
}

/// Longer names would lie over the other half of the chart.
fn shortened(name: &str) -> String {
    const MOST: usize = 20;
    if name.chars().count() <= MOST {
        return name.to_owned();
    }
    let kept: String = name.chars().take(MOST - 1).collect();
    format!("{kept}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(name: &str, x: f64, y: f64) -> Dot {
        let interval = Some([y - 1.0, y + 1.0]);
        Dot { name: name.into(), named: true, colour: 7, x, y, interval }
    }

    fn scatter(dots: Vec<Dot>) -> String {
        let reference = Some(("chance".to_owned(), 2.0));
        Scatter { title: "acc".into(), x: "MiB".into(), dots, reference, ..Scatter::default() }
            .html()
    }

    fn places(html: &str, class: &str) -> Vec<f64> {
        let text = format!("<text class=\"{class}\"");
        let texts = html.split(&text).skip(1);
        texts
            .map(|text| {
                text.split("y=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
            })
            .collect()
    }

    #[test]
    fn every_dot_has_its_place_its_name_and_its_interval() {
        let html = scatter(vec![dot("<a>", 1.0, 5.0), dot("b", 3.0, 7.0), dot("c", f64::NAN, 7.0)]);
        assert_eq!(html.matches("<circle class=\"s1\"").count(), 2, "{html}");
        assert_eq!(html.matches("class=\"whisker\"").count(), 2, "{html}");
        assert!(html.contains("&lt;a&gt;\nMiB 1\nacc 5 [4, 6]\""), "{html}");
        assert!(html.contains("data-tip=\"chance 2\""), "{html}");
        assert!(!html.contains("<a>") && !html.contains("NaN"), "{html}");
        let html = scatter(vec![Dot { named: false, ..dot("quiet", 1.0, 5.0) }]);
        assert!(html.contains("\"s1 pale\"") && !html.contains(">quiet<"), "{html}");
    }

    #[test]
    fn names_do_not_lie_on_each_other() {
        let near = (0..5).map(|n| dot("x", 1.0 + 0.001 * f64::from(n), 5.0)).collect();
        let far = dot("y", 9.0, 5.0);
        let html = scatter([near, vec![far]].concat());
        let mut places = places(&html, "beside");
        assert_eq!(places.len(), 5, "{html}");
        places.sort_by(f64::total_cmp);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] > LINE - 0.2), "{places:?}");
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(shortened("exactly twenty, yes."), "exactly twenty, yes.");
        assert_eq!(shortened("ööööööööööööööööööööööö"), "ööööööööööööööööööö…");
    }

    #[test]
    fn nothing_is_an_empty_frame() {
        let html = Scatter::default().html();
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
    }
}
