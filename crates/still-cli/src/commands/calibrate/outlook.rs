//! Results for other shares of the dense cache, as text and as charts.

use still_eval::wilson;
use still_train::{Calibration, Outlook};

use super::pass_keys::PassKeys;
use crate::plot::{LineChart, Mark, Scale, Series, Stroke};
use crate::table::{self, WIDTH};
use crate::wrap::wrapped;

/// One row a share: its bytes, for each row format how many heads are whole and what is lost, and the pass keys that are found.
/// Then what a whole head costs and which share is enough.
pub fn render(found: &Calibration, keys: Option<&PassKeys>) -> String {
    let (headers, rows) = table(found, keys);
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    let mut text = table::render(&headers, &rows);
    text += "\n\n";
    for outlook in &found.outlook {
        text += &wrapped(&sentence(found, outlook), WIDTH);
        text.push('\n');
    }
    text += &wrapped(&recommendation(found, keys), WIDTH);
    text.push('\n');
    text
}

/// Headers, and a row for each share.
pub fn table(found: &Calibration, keys: Option<&PassKeys>) -> (Vec<String>, Vec<Vec<String>>) {
    let mut shares: Vec<f64> = found
        .outlook
        .iter()
        .flat_map(|rows| rows.points.iter().map(|point| point.cache_fraction))
        .collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let mut headers = vec!["share".to_owned(), "cache".to_owned()];
    for Outlook { rows, .. } in &found.outlook {
        headers.extend([format!("{rows} whole"), "loss".to_owned()]);
    }
    headers.extend(keys.map(|_| "keys".to_owned()));
    let row = |&share: &f64| {
        let bytes = (share * found.dense_bytes as f64) as usize;
        let mut row = vec![percent(share), table::bytes(bytes)];
        for outlook in &found.outlook {
            match outlook.points.iter().find(|point| point.cache_fraction == share) {
                Some(point) => row.extend([point.whole.to_string(), format!("{:.3}", point.loss)]),
                None => row.extend(["–".to_owned(), "–".to_owned()]),
            }
        }
        row.extend(keys.map(|keys| match keys.at(share) {
            Some(right) => format!("{right}/{}", keys.keys),
            None => "–".to_owned(),
        }));
        row
    };
    let rows = shares.iter().map(row).collect();
    (headers, rows)
}

/// `16.4 %`
fn percent(share: f64) -> String {
    format!("{} %", (1e3 * share).round() / 10.0)
}

/// Which share to choose, and why.
pub fn recommendation(found: &Calibration, keys: Option<&PassKeys>) -> String {
    let rows = found.budgets.rows;
    let Some(own) = found.own_outlook() else { return String::new() };
    match (own.recommended, own.knee) {
        (Some(share), _) => {
            let bytes = (share * found.dense_bytes as f64) as usize;
            let asked = keys.and_then(|keys| Some((keys, keys.at(share)?)));
            let asked = asked.map_or_else(String::new, |(keys, right)| {
                format!(
                    " An untrained student of it finds {right} of {} pass keys (teacher: {}).",
                    keys.keys, keys.teacher
                )
            });
            format!(
                "Recommended with rows in {rows}: --cache-fraction {share:.3}, {} at {} tokens. Every head that retrieves is \
                 whole; with less, recall is lost head by head.{asked}",
                table::bytes(bytes),
                table::count(found.budgets.at_length),
            )
        }
        (None, Some(_)) => format!(
            "With rows in {rows} no share of the dense cache holds every head that retrieves whole: calibrate for a longer \
             context (--at-length)."
        ),
        (None, None) => format!(
            "No head of this model retrieves, so that no share stands out: choose by the loss with rows in {rows}."
        ),
    }
}

/// What a whole head costs, and the smallest share that keeps every retrieving head whole.
pub fn sentence(found: &Calibration, outlook: &Outlook) -> String {
    let share = |bytes: usize| 100.0 * bytes as f64 / found.dense_bytes as f64;
    let cost = format!(
        "{}: a whole head takes {} more, {:.2} % of the dense cache",
        outlook.rows,
        table::bytes(outlook.whole_head_bytes),
        share(outlook.whole_head_bytes),
    );
    match (outlook.recommended, outlook.knee) {
        (Some(share), _) => {
            format!("{cost}; every head that retrieves is whole from --cache-fraction {share:.3}.")
        }
        (None, Some(_)) => format!("{cost}; not every head that retrieves fits."),
        (None, None) => format!("{cost}; no head retrieves."),
    }
}

/// Loss, whole heads and, if they were asked for, pass keys over the share.
pub fn charts(found: &Calibration, keys: Option<&PassKeys>) -> Vec<String> {
    let series = |value: &dyn Fn(&still_train::Outcome) -> f64| -> Vec<Series> {
        let series = found.outlook.iter().map(|outlook| Series {
            name: format!("rows in {}", outlook.rows),
            points: outlook
                .points
                .iter()
                .map(|point| (100.0 * point.cache_fraction, value(point)))
                .collect(),
            stroke: Stroke::Dots,
            intervals: Vec::new(),
        });
        series.collect()
    };
    let mut charts = vec![
        over_shares(
            found,
            "Loss",
            "estimate for all heads, nats a token",
            Scale::Log,
            series(&|point| point.loss),
            None,
        ),
        over_shares(
            found,
            "Whole heads",
            "heads that keep every token",
            Scale::Linear,
            series(&|point| point.whole as f64),
            None,
        ),
    ];
    charts.extend(keys.map(|keys| pass_keys(found, keys)));
    charts
}

fn pass_keys(found: &Calibration, keys: &PassKeys) -> String {
    let share = |right: usize| 100.0 * right as f64 / keys.keys as f64;
    let interval = |right: usize| {
        let found = wilson(right, keys.keys).ok()?;
        Some([100.0 * found.low, 100.0 * found.high])
    };
    let series = Series {
        name: format!("untrained student, rows in {}", found.budgets.rows),
        points: keys.points.iter().map(|p| (100.0 * p.cache_fraction, share(p.found))).collect(),
        stroke: Stroke::Dots,
        intervals: keys.points.iter().map(|point| interval(point.found)).collect(),
    };
    let about =
        format!("% of {} in {} tokens, with 95 % intervals", keys.keys, table::count(keys.length));
    let teacher = Some(("teacher".to_owned(), share(keys.teacher)));
    over_shares(found, "Pass keys", &about, Scale::Linear, vec![series], teacher)
}

/// A chart over shares, what is recommended and what was taken pointed out.
fn over_shares(
    found: &Calibration,
    title: &str,
    about: &str,
    scale: Scale,
    series: Vec<Series>,
    reference: Option<(String, f64)>,
) -> String {
    let rows = found.budgets.rows;
    let recommended = found.own_outlook().and_then(|own| own.recommended);
    let recommended = recommended.map(|share| (share, format!("recommended with rows in {rows}")));
    let taken = (found.budgets.cache_fraction, "the budgets on this page".to_owned());
    let mark = |(share, what): (f64, String)| Mark {
        x: 100.0 * share,
        label: format!("{}: {what}", percent(share)),
    };
    LineChart {
        title: title.into(),
        about: about.into(),
        x: "% of the dense cache in bf16".into(),
        scale,
        x_scale: Scale::Log,
        series,
        marks: recommended.into_iter().chain([taken]).map(mark).collect(),
        // A share of keys lies between none and all.
        ends: if reference.is_some() { vec![0.0, 100.0] } else { Vec::new() },
        reference,
    }
    .html()
}
