//! Dots with names: one value against another.

use std::fmt::Write as _;

use super::axis::{Axis, Scale};
use super::figure::{
    Figure, LEFT, Legend, RIGHT, TOP, about, escape, level, number, tick_names, whisker, x_name,
    x_ticks, y_axis,
};
use super::label::{Anchor, Area, LINE, wrapped};

const BOTTOM: f64 = 190.0;
const HEIGHT: f64 = 224.0;
/// Of a dot.
const RADIUS: f64 = 4.0;

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
    /// Its name is written next to it; a dot without is pale.
    pub named: bool,
    /// Which of the page's colors.
    pub color: usize,
    /// Where; a dot whose place is not finite is left out.
    pub x: f64,
    /// Where.
    pub y: f64,
    /// Ends of the interval of y.
    pub interval: Option<[f64; 2]>,
}

impl Dot {
    /// Every y of it: its own and the ends of its interval.
    pub fn ys(&self) -> impl Iterator<Item = f64> {
        std::iter::once(self.y).chain(self.interval.into_iter().flatten())
    }
}

impl Scatter {
    /// The figure, as HTML.
    pub fn html(&self) -> String {
        let xs = self.dots.iter().map(|dot| dot.x);
        let x = Axis::over(xs, None, self.x_scale, (LEFT + 8.0, RIGHT - 8.0)).with_margin(0.08);
        let ys = self.dots.iter().flat_map(Dot::ys);
        let ys = ys.chain(self.reference.iter().map(|(_, y)| *y));
        let y = Axis::over(ys, None, self.scale, (BOTTOM, TOP)).with_margin(0.08);

        let mut svg = String::new();
        y_axis(&mut svg, &y);
        let ticks = x.ticks();
        let named = ticks.iter().zip(tick_names(&ticks));
        x_ticks(&mut svg, BOTTOM, named.filter_map(|(&tick, name)| Some((x.at(tick)?, name))));
        x_name(&mut svg, BOTTOM, &about(&self.x, self.x_scale));
        if let Some((name, value)) = &self.reference {
            level(&mut svg, &y, name, *value);
        }
        let mut placed: Vec<(&Dot, f64, f64)> =
            self.dots.iter().filter_map(|dot| Some((dot, x.at(dot.x)?, y.at(dot.y)?))).collect();
        placed.sort_by(|a, b| a.2.total_cmp(&b.2));
        // What names must not lie on: dots with their intervals, the reference, and the names before them.
        let mut taken: Vec<Area> =
            placed.iter().map(|(dot, at, height)| area(dot, (*at, *height), &y)).collect();
        if let Some(at) = self.reference.as_ref().and_then(|(_, value)| y.at(*value)) {
            taken.push(Area { left: LEFT, right: RIGHT, top: at - 1.0, bottom: at + 1.0 });
        }
        for (dot, at, height) in &placed {
            self.draw(&mut svg, dot, (*at, *height), &y);
        }
        // Last, so that nothing is drawn over them.
        for (dot, at, height) in placed.iter().filter(|(dot, ..)| dot.named) {
            let lines = wrapped(&dot.name, WIDEST_NAME);
            let (class, [x, y], area) = beside(&lines, (*at, *height), &taken);
            taken.push(area);
            for (n, line) in lines.iter().enumerate() {
                let y = y + n as f64 * LINE;
                let _ = write!(
                    svg,
                    "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
                    escape(line)
                );
            }
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
            "<circle class=\"s{}{}\" data-tip=\"{}\" cx=\"{at:.1}\" cy=\"{height:.1}\" r=\"{RADIUS}\"/>",
            dot.color % 6,
            if dot.named { "" } else { " pale" },
            escape(&tip)
        );
    }
}

/// What a dot and its interval cover.
fn area(dot: &Dot, (x, height): (f64, f64), y: &Axis) -> Area {
    let ends = dot.interval.into_iter().flatten().filter_map(|end| y.at(end));
    let around = Area::around(x, height, RADIUS);
    ends.fold(around, |area, end| Area {
        top: area.top.min(end),
        bottom: area.bottom.max(end),
        ..area
    })
}

/// Where the lines of a dot's name stand: as near to it as what is taken allows, at its side towards the middle first. Their
/// class, the place of the first, and their area. Where nothing is free, they stand at their dot's side.
fn beside(lines: &[String], (x, y): (f64, f64), taken: &[Area]) -> (&'static str, [f64; 2], Area) {
    let right = ("beside", Anchor::Start, x + 7.0);
    let left = ("name", Anchor::End, x - 7.0);
    let sides = if x > f64::midpoint(LEFT, RIGHT) { [left, right] } else { [right, left] };
    let height = lines.len().saturating_sub(1) as f64 * LINE;
    let widest = lines.iter().max_by_key(|line| line.chars().count());
    let widest = widest.map_or("", String::as_str);
    let place = |(class, anchor, x): (&'static str, Anchor, f64), y: f64| {
        let first = Area::of_text(widest, anchor, x, y);
        (class, [x, y], Area { bottom: first.bottom + height, ..first })
    };
    let (low, high) = (TOP + 9.0, BOTTOM - 3.0 - height);
    // In the middle of the dot's height, as far as the drawing allows.
    let line = (y + 4.0 - height / 2.0).clamp(low, high.max(low));
    let steps = (0..60).map(|n| f64::from(n / 2 + n % 2) * if n % 2 == 0 { -STEP } else { STEP });
    let places = steps.flat_map(|step| sides.map(|side| place(side, line + step)));
    let free = |(_, [_, y], area): &(&str, [f64; 2], Area)| {
        let inside = area.left >= LEFT && area.right <= RIGHT && (low..=high).contains(y);
        inside && !taken.iter().any(|other| other.meets(area))
    };
    places.into_iter().find(free).unwrap_or_else(|| place(sides[0], line))
}

/// How far a name moves at a time to get out of another's way.
const STEP: f64 = 6.0;
/// Longer lines of names would lie over the other half of the chart.
const WIDEST_NAME: f64 = 170.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::label::{assert_readable, words_of};

    fn dot(name: &str, x: f64, y: f64) -> Dot {
        let interval = Some([y - 1.0, y + 1.0]);
        Dot { name: name.into(), named: true, color: 7, x, y, interval }
    }

    fn scatter(dots: Vec<Dot>) -> String {
        let reference = Some(("chance".to_owned(), 2.0));
        Scatter { title: "acc".into(), x: "MiB".into(), dots, reference, ..Scatter::default() }
            .html()
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
        // Six at one place, and long ones from either side that reach beyond the middle.
        let near = (0..6).map(|n| dot(&format!("name {n}"), 1.0 + 0.001 * f64::from(n), 5.0));
        let far = [(9.0, "a long name, from right"), (4.0, "a long name, from left")];
        let far = far.map(|(x, name)| dot(name, x, 5.0));
        let html = scatter(near.chain(far).collect());
        assert_readable(&html);
        let names = words_of(&html).into_iter();
        let names = names.filter(|(class, ..)| ["beside", "name"].contains(&class.as_str()));
        assert_eq!(names.count(), 8 + 1, "eight dots and what x is: {html}");
    }

    #[test]
    fn long_names_are_whole_in_several_lines() {
        let name = "smollm2-135m-instruct-10-percent-int8-of-the-dense-cache";
        let html = scatter(vec![dot(name, 1.0, 5.0), dot("b", 1.1, 5.1)]);
        assert_readable(&html);
        let lines: String = words_of(&html)
            .into_iter()
            .filter(|(class, text, _)| class == "beside" && text != "b")
            .map(|(_, text, _)| text)
            .collect();
        assert_eq!(lines, name, "{html}");
    }

    #[test]
    fn names_lie_on_no_interval_and_no_reference() {
        // The reference goes through the first dot; the second's interval is where the first one's name would stand.
        let tall = Dot { interval: Some([0.0, 9.0]), ..dot("tall", 1.3, 8.0) };
        let html = scatter(vec![dot("first", 1.0, 2.0), tall]);
        let words = words_of(&html);
        let (_, _, name) = words.iter().find(|(_, text, _)| text == "first").unwrap();
        let path = html.split("class=\"level\"").nth(1).unwrap().split("d=\"M55 ").nth(1).unwrap();
        let level: f64 = path.split('H').next().unwrap().parse().unwrap();
        assert!(level < name.top || level > name.bottom, "{level} in {name:?}: {html}");
    }

    #[test]
    fn nothing_is_an_empty_frame() {
        let html = Scatter::default().html();
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
    }
}
