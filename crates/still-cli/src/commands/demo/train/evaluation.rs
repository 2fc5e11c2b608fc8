//! One row of the demo's table.

use anyhow::Context;
use serde::Serialize;
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::run::{Answer, Sample, mean};
use still_eval::task::{Metric, Task};
use still_eval::{Nll, Yardstick};
use still_model::Model;

use super::text::{EVAL_WINDOW, SHORT};
use crate::commands::demo::DemoArgs;
use crate::printer::Printer;
use crate::verdict::{HELDOUT, measure};

/// What is measured of every model.
#[derive(Debug)]
pub struct Bench(Yardstick);

/// A row of the table: what one model scored.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `teacher`, `untrained`, `stage1`, `stage2` or, with `--full`, `window_only`.
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
    /// Tokens decoded per second after 1024 tokens, from the median step.
    pub decode_tokens_per_s_1k: f64,
    /// Tokens decoded per second after 4096 tokens, from the median step.
    pub decode_tokens_per_s_4k: f64,
    /// Tokens of a prompt of 4096 read per second.
    pub prefill_tokens_per_s: f64,
    /// What it answered to each pass key.
    pub passkey_answers: Vec<PasskeyAnswer>,
    /// What perplexity was computed from.
    #[serde(skip)]
    pub nll: Nll,
}

/// What a model answered to a pass key.
#[derive(Debug, Serialize)]
pub struct PasskeyAnswer {
    /// The hidden key.
    pub key: String,
    /// The decoded answer.
    pub answer: String,
    /// Whether the answer begins with the key.
    pub right: bool,
}

impl Bench {
    /// The demo's held-out text, pass keys in [`EVAL_WINDOW`] tokens, and speed after [`SHORT`] and as many tokens.
    ///
    /// # Errors
    /// If the model's tokenizer fails.
    pub fn new(args: &DemoArgs, heldout: Task, model: &Model) -> anyhow::Result<Self> {
        let options =
            LongOptions { length: EVAL_WINDOW, items: args.keys, seed: args.seed, chat: false };
        let (vocab_size, files) = (model.config().vocab_size, LongFiles::default());
        let passkey = LongTask::Passkey.build(&model.tokenizer, vocab_size, &files, options)?;
        Ok(Self(Yardstick {
            document: None,
            tasks: vec![heldout, passkey],
            contexts: vec![SHORT, EVAL_WINDOW],
            decode_steps: args.decode_steps,
        }))
    }

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
        let measured = measure(&self.0, name, model, printer)?;
        let keys = measured.samples(LongTask::Passkey.name());
        let [short, full] = measured.points[..] else {
            return Err(anyhow::anyhow!("two contexts were to be timed"));
        };
        let nll = measured.nll(HELDOUT).context("no held-out window was read")?;
        Ok(Row {
            model: name,
            // Causal attention: the first 1024 positions of a window are a window of 1024.
            ppl_1k: nll.prefix(SHORT).perplexity(),
            ppl_4k: nll.perplexity(),
            passkey_4k: mean(keys, Metric::Score),
            cache_bytes_1k: short.prefilled_cache_bytes,
            cache_bytes_4k: full.prefilled_cache_bytes,
            decode_tokens_per_s_1k: 1e3 / short.decode_p50_ms,
            decode_tokens_per_s_4k: 1e3 / full.decode_p50_ms,
            prefill_tokens_per_s: full.prefill_tokens_per_s,
            passkey_answers: keys.iter().filter_map(passkey_answer).collect(),
            nll,
        })
    }
}

fn passkey_answer(sample: &Sample) -> Option<PasskeyAnswer> {
    let right = sample.scores.get(&Metric::Score) == Some(&1.0);
    match &sample.answer {
        Answer::Generation { text, targets, .. } => {
            Some(PasskeyAnswer { key: targets.concat(), answer: text.clone(), right })
        }
        _ => None,
    }
}
