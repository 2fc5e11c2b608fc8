//! One row of the demo's table.

use serde::Serialize;
use still_attention::RowDtype;
use still_eval::{LongContext, LongContextOptions, Nll, PasskeyAnswer, PasskeyPrompts};
use still_model::Model;

use super::text::{EVAL_WINDOW, SHORT};
use crate::printer::Printer;
use crate::progress::Bar;

/// What is measured of every model.
#[derive(Debug)]
pub struct Bench<'a> {
    /// Held-out tokens.
    pub heldout: &'a [u32],
    /// Held-out windows read.
    pub windows: usize,
    /// Pass-key prompts, the same for all.
    pub prompts: PasskeyPrompts,
    /// Decode steps timed at each context.
    pub decode_steps: usize,
}

/// A row of the table: what one model scored.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `teacher`, `untrained`, `stage1`, `stage2` or `window_only`.
    pub model: &'static str,
    /// Perplexity over the first 1024 positions of every held-out window.
    pub ppl_1k: f64,
    /// Perplexity over all 4096 positions of every held-out window.
    pub ppl_4k: f64,
    /// Share of pass keys found in 4096 tokens.
    pub passkey_4k: f64,
    /// Bytes of the attention cache after 1024 tokens, 16-bit rows.
    pub cache_bytes_1k: usize,
    /// Bytes of the attention cache after 4096 tokens, 16-bit rows.
    pub cache_bytes_4k: usize,
    /// Tokens decoded per second after 1024 tokens.
    pub decode_tokens_per_s_1k: f64,
    /// Tokens decoded per second after 4096 tokens.
    pub decode_tokens_per_s_4k: f64,
    /// Tokens read per second, over the pass-key prompts.
    pub prefill_tokens_per_s: f64,
    /// What it answered to each pass key.
    pub passkey_answers: Vec<PasskeyAnswer>,
    /// What perplexity was computed from.
    #[serde(skip)]
    pub nll: Nll,
}

impl Bench<'_> {
    /// Measures a model, with a bar.
    ///
    /// # Errors
    /// If the model fails.
    pub fn measure(
        &self,
        name: &'static str,
        model: &Model,
        printer: &Printer,
    ) -> anyhow::Result<Row> {
        let total = self.windows * EVAL_WINDOW + self.prompts.tokens_to_read();
        let bar = Bar::new(printer, "Evaluating", name, total, "tokens");
        let progress = |tokens: usize| bar.advance(tokens);
        let nll = still_eval::evaluate_windows(
            model,
            self.heldout,
            EVAL_WINDOW,
            self.windows,
            RowDtype::F32,
            &progress,
        )?;
        let options = LongContextOptions {
            marks: vec![SHORT, EVAL_WINDOW],
            decode_steps: self.decode_steps,
            rows: RowDtype::Bf16,
        };
        let long = still_eval::long_context(model, &self.prompts, &options, &progress)?;
        let row = row(name, nll, &long)?;
        bar.done(format_args!(
            "{name}: perplexity {:.2} at 1k, {:.2} at 4k,",
            row.ppl_1k, row.ppl_4k
        ));
        Ok(row)
    }
}

fn row(model: &'static str, nll: Nll, long: &LongContext) -> anyhow::Result<Row> {
    let [short, full] = long.points.as_slice() else {
        anyhow::bail!("{} contexts were measured instead of 2", long.points.len());
    };
    Ok(Row {
        model,
        // Causal attention: the first 1024 positions of a window are a window of 1024.
        ppl_1k: nll.prefix(SHORT).perplexity(),
        ppl_4k: nll.perplexity(),
        passkey_4k: long.recall(),
        cache_bytes_1k: short.cache_bytes,
        cache_bytes_4k: full.cache_bytes,
        decode_tokens_per_s_1k: short.decode_tokens_per_s,
        decode_tokens_per_s_4k: full.decode_tokens_per_s,
        prefill_tokens_per_s: long.prefill_tokens_per_s,
        passkey_answers: long.answers.clone(),
        nll,
    })
}
