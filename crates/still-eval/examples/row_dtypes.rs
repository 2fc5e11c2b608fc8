//! What narrower rows in the attention cache cost: perplexity and cache bytes for every [`RowDtype`], one JSON object a line.
//!
//! `cargo run --release -p still-eval --example row_dtypes -- MODEL TEXT [WINDOWS]`, windows of 4,096 tokens. A model that is not
//! a student reads with 4 of every 64 tokens kept, untrained.

use std::error::Error;

use still_attention::{RowDtype, StillConfig};
use still_eval::{PairedBootstrap, evaluate_windows};
use still_model::{FeatureInit, Model, Student};

const WINDOW: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(text)) = (args.next(), args.next()) else {
        return Err("usage: row_dtypes MODEL TEXT [WINDOWS]".into());
    };
    let windows = args.next().map_or(Ok(8), |windows| windows.parse())?;
    let mut model = Model::load(&model)?;
    if model.student.is_none() {
        let config = model.config();
        let still = StillConfig::uniform(config.num_hidden_layers, config.geometry(), 64, 4);
        model.student = Some(Student::init(still, config, FeatureInit::Identity, 0)?);
    }
    let tokens = model.tokenizer.encode(&std::fs::read_to_string(text)?, false)?;

    let mut exact = None;
    for rows in RowDtype::ALL {
        let nll = evaluate_windows(&model, &tokens, WINDOW, windows, rows, &|_| {})?;
        let exact = exact.get_or_insert_with(|| nll.clone());
        let loss = PairedBootstrap::default().difference(&nll, exact)?;
        let mut cache = model.new_cache(1, rows)?;
        model.prefill(&tokens[..WINDOW], &mut cache)?;
        let line = serde_json::json!({
            "rows": format!("{rows:?}"),
            "tokens": nll.tokens(),
            "ppl_4k": nll.perplexity(),
            "nats_above_f32": { "mean": loss.mean, "low": loss.low, "high": loss.high },
            "cache_bytes_4k": cache.size_bytes(),
        });
        println!("{line}");
    }
    Ok(())
}
