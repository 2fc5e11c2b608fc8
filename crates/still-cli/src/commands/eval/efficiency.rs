//! `--efficiency`: cache bytes, prefill and decode speed, by length.

use serde_json::{Value, json};
use still_attention::RowDtype;
use still_eval::{BenchPoint, ModelBench};
use still_model::Model;

use super::Evaluated;
use crate::commands::short_name;
use crate::printer::Printer;
use crate::progress::Bar;
use crate::table;

/// Tokens decoded after each length.
const NEW_TOKENS: usize = 32;

/// Every length of `--efficiency`, measured as `still bench model` does.
pub fn measure(
    name: &str,
    model: &Model,
    rows: RowDtype,
    lengths: &[usize],
    printer: &Printer,
) -> anyhow::Result<Vec<BenchPoint>> {
    let bench = ModelBench::new(model, 1, rows)?;
    let bar = Bar::new(printer, "Timing", &short_name(name), lengths.len(), "lengths");
    let point = |&context: &usize| {
        bar.message(format!("{context} tokens"));
        let point = bench.time(context, NEW_TOKENS)?;
        bar.advance(1);
        printer.step("Timed", format_args!("{} at {context} tokens", short_name(name)));
        Ok(point)
    };
    lengths.iter().map(point).collect()
}

/// What a cache takes whatever it has read, and what for each token: the line through its bytes at the shortest and the longest
/// length. `None` of a single length.
///
/// A cache that is capped grows more slowly later than this line says.
pub fn growth(points: &[BenchPoint]) -> Option<(f64, f64)> {
    let first = points.iter().min_by_key(|point| point.context)?;
    let last = points.iter().max_by_key(|point| point.context)?;
    let tokens = last.context.checked_sub(first.context).filter(|&tokens| tokens > 0)?;
    let slope = (last.cache_bytes as f64 - first.cache_bytes as f64) / tokens as f64;
    // Of what was read before the last step and what was decoded.
    let fed = (first.context + NEW_TOKENS) as f64;
    Some((first.cache_bytes as f64 - slope * fed, slope))
}

/// A row for every model and length.
pub fn render(models: &[Evaluated]) -> String {
    let headers =
        ["model", "tokens", "prefill tokens/s", "decode tokens/s", "cache", "fixed", "per token"];
    let mut rows = Vec::new();
    for model in models {
        let growth = growth(&model.efficiency);
        for (n, point) in model.efficiency.iter().enumerate() {
            let mut row = vec![
                short_name(&model.model),
                point.context.to_string(),
                format!("{:.0}", point.prefill_tokens_per_s),
                format!("{:.1}", point.decode_tokens_per_s),
                table::bytes(point.cache_bytes),
            ];
            if let (0, Some((fixed, per_token))) = (n, growth) {
                row.push(table::bytes(fixed.max(0.0).round() as usize));
                row.push(table::bytes(per_token.max(0.0).round() as usize));
            }
            rows.push(row);
        }
    }
    format!(
        "\n{}\n\n{} threads; {NEW_TOKENS} tokens decoded at each length.",
        table::render(&headers, &rows),
        rayon::current_num_threads()
    )
}

/// `{"points": [{"context", "prefill_tokens_per_s", …}], "fixed_bytes", "bytes_per_token"}`
pub fn to_json(points: &[BenchPoint]) -> Value {
    let growth = growth(points);
    json!({
        "points": points,
        "fixed_bytes": growth.map(|(fixed, _)| fixed),
        "bytes_per_token": growth.map(|(_, per_token)| per_token),
        "threads": rayon::current_num_threads(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(context: usize, cache_bytes: usize) -> BenchPoint {
        BenchPoint {
            batch: 1,
            context,
            prefill_tokens_per_s: 1.0,
            onto_tokens_per_s: None,
            decode_tokens_per_s: 1.0,
            decode_p50_ms: 1.0,
            decode_p99_ms: 1.0,
            decode_max_ms: None,
            cache_bytes,
            cache_parts: None,
            used_cache_bytes: cache_bytes,
            prefilled_cache_bytes: cache_bytes,
        }
    }

    #[test]
    fn a_cache_is_a_fixed_part_and_one_that_grows() {
        let bytes = |context: usize| 1000 + 24 * (context + NEW_TOKENS);
        let points = [64, 512, 128].map(|context| point(context, bytes(context)));
        assert_eq!(growth(&points), Some((1000.0, 24.0)));
        assert_eq!(growth(&points[..1]), None);
        assert_eq!(growth(&[]), None);
    }
}
