//! The terminal's view of a routing.

use std::collections::HashMap;

use serde::Serialize;
use still_attention::StateBytes;

use super::routing::{Place, Routing};
use crate::table;

/// Tokens listed as kept most often.
const TOP: usize = 12;

/// What `still inspect` prints.
#[derive(Debug, Serialize)]
pub struct Summary {
    tokens: usize,
    chunk: usize,
    router: String,
    hypothetical: bool,
    cache_bytes: usize,
    cache_parts: StateBytes,
    dense_bytes: usize,
    layers: Vec<LayerSummary>,
    most_kept: Vec<KeptText>,
}

#[derive(Debug, Serialize)]
struct LayerSummary {
    layer: usize,
    budgets: Vec<usize>,
    /// Salient tokens after the text, per selection head.
    salient: Vec<usize>,
    cache_bytes: usize,
    dense_bytes: usize,
    /// The token with the highest score among those kept, per selection head.
    top: Vec<Option<TopToken>>,
}

#[derive(Debug, Serialize)]
struct TopToken {
    position: usize,
    text: String,
    score: f32,
}

#[derive(Debug, Serialize)]
struct KeptText {
    text: String,
    /// Retired occurrences.
    times: usize,
    /// Mean share of heads that keep an occurrence.
    kept_share: f64,
}

impl Summary {
    /// Condenses a routing.
    pub fn new(routing: &Routing) -> Self {
        let layers = routing.layers.iter().enumerate().map(|(layer, routed)| LayerSummary {
            layer,
            budgets: routed.heads.iter().map(|head| head.budget).collect(),
            salient: routed
                .heads
                .iter()
                .map(|head| head.places.iter().filter(|&&place| place == Place::Salient).count())
                .collect(),
            cache_bytes: routed.cache.total(),
            dense_bytes: routed.dense_bytes,
            top: routed
                .heads
                .iter()
                .map(|head| {
                    (0..head.scores.len())
                        .filter(|&token| head.places[token] == Place::Salient)
                        // Token 0 wins everywhere: it has nothing to attend to but itself.
                        .filter(|&token| token > 0)
                        .max_by(|&a, &b| head.scores[a].total_cmp(&head.scores[b]))
                        .map(|position| TopToken {
                            position,
                            text: routing.tokens[position].clone(),
                            score: head.scores[position],
                        })
                })
                .collect(),
        });
        Self {
            tokens: routing.tokens.len(),
            chunk: routing.chunk,
            router: routing.router.clone(),
            hypothetical: routing.hypothetical,
            cache_bytes: routing.cache().total(),
            cache_parts: routing.cache(),
            dense_bytes: routing.dense_bytes(),
            layers: layers.collect(),
            most_kept: most_kept(routing),
        }
    }

    /// As text for a terminal.
    pub fn render(&self) -> String {
        let share = self.cache_bytes as f64 / self.dense_bytes.max(1) as f64;
        let mut lines = vec![format!(
            "{} tokens, chunks of {}, ranked by {}{}",
            self.tokens,
            self.chunk,
            self.router,
            if self.hypothetical {
                " (not a student: routed as an untrained one would be)"
            } else {
                ""
            },
        )];
        lines.push(format!(
            "cache {} of {} dense ({:.1} %): {}",
            table::bytes(self.cache_bytes),
            table::bytes(self.dense_bytes),
            100.0 * share,
            table::parts(&self.cache_parts)
        ));
        lines.push(String::new());
        let rows: Vec<Vec<String>> = self.layers.iter().map(LayerSummary::row).collect();
        lines.push(table::render(&["layer", "budgets", "salient", "cache", "top tokens"], &rows));
        if !self.most_kept.is_empty() {
            lines.push(String::new());
            lines.push("kept by the largest share of heads:".into());
            let rows: Vec<Vec<String>> = self.most_kept.iter().map(KeptText::row).collect();
            lines.push(table::render(&["token", "times", "kept by"], &rows));
        }
        lines.join("\n")
    }
}

impl LayerSummary {
    fn row(&self) -> Vec<String> {
        let join = |numbers: &[usize]| {
            numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        let share = self.cache_bytes as f64 / self.dense_bytes.max(1) as f64;
        let top = self.top.iter().map(|top| {
            top.as_ref().map_or("-".into(), |top| format!("{:?}@{}", top.text, top.position))
        });
        // A layer that keeps its attention.
        let budgets = if self.budgets.is_empty() { "window".into() } else { join(&self.budgets) };
        vec![
            self.layer.to_string(),
            budgets,
            join(&self.salient),
            format!("{:.1} %", 100.0 * share),
            top.collect::<Vec<_>>().join(" "),
        ]
    }
}

impl KeptText {
    fn row(&self) -> Vec<String> {
        vec![
            format!("{:?}", self.text),
            self.times.to_string(),
            format!("{:.0} %", 100.0 * self.kept_share),
        ]
    }
}

/// Token texts ordered by the share of heads that keep them, among retired occurrences.
fn most_kept(routing: &Routing) -> Vec<KeptText> {
    let Some(places) = routing.layers.iter().find_map(|layer| layer.heads.first()) else {
        return Vec::new();
    };
    let share = routing.kept_share();
    let mut by_text: HashMap<&str, (usize, f64)> = HashMap::new();
    for (token, text) in routing.tokens.iter().enumerate() {
        if places.places[token] != Place::Window {
            let entry = by_text.entry(text).or_default();
            *entry = (entry.0 + 1, entry.1 + share[token]);
        }
    }
    let mut kept: Vec<KeptText> = by_text
        .into_iter()
        .map(|(text, (times, sum))| KeptText {
            text: text.to_owned(),
            times,
            kept_share: sum / times as f64,
        })
        .filter(|kept| kept.kept_share > 0.0)
        .collect();
    kept.sort_by(|a, b| b.kept_share.total_cmp(&a.kept_share).then_with(|| a.text.cmp(&b.text)));
    kept.truncate(TOP);
    kept
}
