//! The self-contained HTML page: a template and one block of data.

use minijinja::context;
use serde::Serialize;

use super::routing::{HeadRouting, Place, Routing};
use crate::page;
use crate::provenance::Provenance;

const TEMPLATE: &str = include_str!("page.html");

/// What the page's script reads.
#[derive(Serialize)]
struct Data<'a> {
    model: &'a str,
    text: &'a str,
    router: &'a str,
    hypothetical: bool,
    chunk: usize,
    tokens: &'a [String],
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    layer: usize,
    cache_bytes: usize,
    dense_bytes: usize,
    heads: Vec<Head>,
}

#[derive(Serialize)]
struct Head {
    budget: usize,
    low: f32,
    high: f32,
    /// A byte a token, hexadecimal: the score between `low` and `high` in 255 steps.
    scores: String,
    /// A digit a token: 0 absorbed, 1 salient, 2 window, 3 demoted.
    places: String,
}

/// Renders the page.
///
/// # Errors
/// If the data cannot be serialized.
pub fn render(routing: &Routing, model: &str, text: &str) -> anyhow::Result<String> {
    let layers = routing.layers.iter().enumerate().map(|(n, layer)| Layer {
        layer: n,
        cache_bytes: layer.cache.total(),
        dense_bytes: layer.dense_bytes,
        heads: layer.heads.iter().map(head).collect(),
    });
    let data = Data {
        model,
        text,
        router: &routing.router,
        hypothetical: routing.hypothetical,
        chunk: routing.chunk,
        tokens: &routing.tokens,
        layers: layers.collect(),
    };
    // A token may spell "</script>"; JSON may spell "<" otherwise.
    let json = serde_json::to_string(&data)?.replace('<', "\\u003c");
    let made = page::made(&[Provenance::now(model, "cpu")]);
    page::render(TEMPLATE, context! { data => json, model, text, made })
}

fn head(head: &HeadRouting) -> Head {
    // Token 0 has nothing to attend to but itself: its score would flatten all others.
    let rest = || head.scores.iter().skip(1).copied().filter(|score| score.is_finite());
    let (low, high) =
        (rest().fold(f32::INFINITY, f32::min), rest().fold(f32::NEG_INFINITY, f32::max));
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    let level = |score: f32| (255.0 * (score - low) / (high - low)).clamp(0.0, 255.0) as u8;
    Head {
        budget: head.budget,
        low,
        high,
        scores: head.scores.iter().map(|&score| format!("{:02x}", level(score))).collect(),
        places: head
            .places
            .iter()
            .map(|place| match place {
                Place::Absorbed => '0',
                Place::Salient => '1',
                Place::Window => '2',
                Place::Demoted => '3',
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use still_attention::StateBytes;

    use super::super::routing::LayerRouting;
    use super::*;

    #[test]
    fn the_page_is_self_contained_and_escaped() {
        let routing = Routing {
            tokens: vec!["</script>".into(), " a".into(), " b".into()],
            chunk: 64,
            router: "Self-Saliency Score".into(),
            hypothetical: true,
            layers: vec![LayerRouting {
                heads: vec![HeadRouting {
                    budget: 4,
                    scores: vec![18.4, 1.0, 2.0],
                    places: vec![Place::Salient, Place::Absorbed, Place::Window],
                }],
                cache: StateBytes { kept_rows: 1, ..StateBytes::default() },
                dense_bytes: 2,
            }],
        };
        let page = render(&routing, "tiny", "a.txt").unwrap();
        assert!(!page.contains("{{") && !page.contains("{%"));
        assert_eq!(page.matches("</script>").count(), 2, "the data's and the code's only");
        assert!(page.contains(r#""scores":"ff00ff","places":"102""#), "{page}");
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "the page refers to {outside}");
        }
    }
}
