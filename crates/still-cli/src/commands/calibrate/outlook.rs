//! What other shares of the dense cache would give, as text and as a chart.

use still_train::{Calibration, Outlook};

use crate::plot::{LineChart, Scale, Series, Stroke};
use crate::table;

/// One row a share, for each row format how many heads are whole and what is lost; then what a whole head costs and which share
/// is enough.
pub fn render(found: &Calibration) -> String {
    let mut shares: Vec<f64> = found
        .outlook
        .iter()
        .flat_map(|rows| rows.points.iter().map(|point| point.cache_fraction))
        .collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let mut headers = vec!["share".to_owned()];
    for Outlook { rows, .. } in &found.outlook {
        headers.extend([format!("{rows} whole"), "loss".to_owned()]);
    }
    let rows: Vec<Vec<String>> = shares
        .iter()
        .map(|&share| {
            let mut row = vec![format!("{:.0} %", 100.0 * share)];
            for outlook in &found.outlook {
                match outlook.points.iter().find(|point| point.cache_fraction == share) {
                    Some(point) => {
                        row.extend([point.whole.to_string(), format!("{:.3}", point.loss)]);
                    }
                    None => row.extend(["-".to_owned(), "-".to_owned()]),
                }
            }
            row
        })
        .collect();
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    let mut text = table::render(&headers, &rows);
    text += "\n\n";
    for outlook in &found.outlook {
        text += &sentence(found, outlook);
        text.push('\n');
    }
    let own = found.outlook.iter().find(|outlook| outlook.rows == found.budgets.rows);
    if let Some(knee) = own.and_then(|own| own.knee) {
        text += &format!(
            "Recommended with rows in {}: --cache-fraction {:.3}; with less, recall is lost head by head.\n",
            found.budgets.rows,
            rounded_up(knee),
        );
    }
    text
}

/// In thousandths: what is less would not hold them.
fn rounded_up(share: f64) -> f64 {
    (1e3 * share).ceil() / 1e3
}

/// What a whole head costs, and the smallest share that keeps every retrieving head whole.
fn sentence(found: &Calibration, outlook: &Outlook) -> String {
    let share = |bytes: usize| 100.0 * bytes as f64 / found.dense_bytes as f64;
    let cost = format!(
        "{}: a whole head takes {} more, {:.2} % of the dense cache",
        outlook.rows,
        table::bytes(outlook.whole_head_bytes),
        share(outlook.whole_head_bytes),
    );
    match outlook.knee {
        Some(knee) => format!(
            "{cost}; every head that retrieves is whole from --cache-fraction {:.3}.",
            rounded_up(knee)
        ),
        None => format!("{cost}; no head retrieves."),
    }
}

/// Estimated loss over the share, a curve for each row format.
pub fn chart(found: &Calibration) -> String {
    let series = found.outlook.iter().map(|outlook| Series {
        name: format!("rows in {}", outlook.rows),
        points: outlook.points.iter().map(|p| (100.0 * p.cache_fraction, p.loss)).collect(),
        stroke: Stroke::Dots,
        intervals: Vec::new(),
    });
    LineChart {
        title: "Other shares".into(),
        about: "estimated loss of all heads, nats a token".into(),
        x: "% of the dense cache".into(),
        scale: Scale::Log,
        x_scale: Scale::Log,
        series: series.collect(),
        marks: Vec::new(),
    }
    .html()
}
