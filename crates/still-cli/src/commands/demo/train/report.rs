//! The demo's result, as a table and as JSON.

use serde::Serialize;
use still_eval::{Interval, PairedBootstrap, gap_closed};

use super::evaluation::Row;
use super::text::EVAL_WINDOW;
use crate::books;
use crate::table;
use crate::verdict::Sample;

/// Seconds spent on each part.
#[derive(Debug, Default, Serialize)]
pub struct Parts {
    /// Fetching, checking and loading the model.
    pub load: f64,
    /// Finding a budget for every head.
    pub calibration: f64,
    /// Attention transfer.
    pub stage1: f64,
    /// Low-rank finetuning.
    pub stage2: f64,
    /// Training the window-only student, with `--full`.
    pub window_only: f64,
    /// Measuring the models.
    pub evaluation: f64,
    /// Writing samples.
    pub samples: f64,
}

/// The object that `still demo --json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// One row per model.
    pub rows: Vec<Row>,
    /// Wall-clock seconds in all.
    pub seconds: f64,
    /// Short texts from teacher and student.
    pub samples: Vec<Sample>,
    /// Share of the untrained student's log-perplexity gap to the teacher at 4k that training closed.
    pub gap_closed_4k: Option<f64>,
    /// Mean NLL of stage 2 minus window-only at 4k, nats per token, 95 % paired bootstrap; below 0 is better. Absent without
    /// `--full`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage2_minus_window_only_4k: Option<Interval>,
    /// The student's cache at 4k as a share of the teacher's.
    pub cache_share_4k: f64,
    /// Where the time went.
    pub seconds_by_part: Parts,
    /// What ran.
    pub setting: Setting,
}

/// What a reader needs to compare two reports.
#[derive(Debug, Serialize)]
pub struct Setting {
    /// Version of `still`.
    pub version: &'static str,
    /// The base model.
    pub base: String,
    /// Where it ran.
    pub device: &'static str,
    /// Threads of the operator.
    pub threads: usize,
    /// Number format of weights and activations.
    pub dtype: &'static str,
    /// Number format of exact rows where cache and decode speed are measured.
    pub cache_rows: &'static str,
    /// Training tokens of stage 1.
    pub stage1_tokens: usize,
    /// Training tokens of stage 2.
    pub stage2_tokens: usize,
    /// Held-out tokens.
    pub heldout_tokens: usize,
    /// Seed of everything.
    pub seed: u64,
}

impl Report {
    /// Derives the comparisons from the rows.
    ///
    /// # Errors
    /// If a row is missing.
    pub fn new(
        rows: Vec<Row>,
        samples: Vec<Sample>,
        seconds: f64,
        seconds_by_part: Parts,
        setting: Setting,
    ) -> anyhow::Result<Self> {
        let row = |name: &str| {
            let found = rows.iter().find(|row| row.model == name);
            found.ok_or_else(|| anyhow::anyhow!("the table has no row {name}"))
        };
        let (teacher, untrained) = (row("teacher")?, row("untrained")?);
        let (stage2, window_only) = (row("stage2")?, row("window_only").ok());
        let bootstrap = PairedBootstrap { seed: setting.seed, ..PairedBootstrap::default() };
        let difference = |other: &Row| bootstrap.difference(&stage2.nll, &other.nll);
        Ok(Self {
            gap_closed_4k: gap_closed(teacher.ppl_4k, untrained.ppl_4k, stage2.ppl_4k),
            stage2_minus_window_only_4k: window_only.map(difference).transpose()?,
            cache_share_4k: stage2.cache_bytes_4k as f64 / teacher.cache_bytes_4k as f64,
            rows,
            seconds,
            samples,
            seconds_by_part,
            setting,
        })
    }

    /// As text for a terminal.
    pub fn render(&self) -> String {
        let dense = self.rows.first().map_or(1, |row| row.cache_bytes_4k.max(1));
        let cells = |row: &Row| {
            vec![
                label(row.model).to_owned(),
                format!("{:.2}", row.ppl_1k),
                format!("{:.2}", row.ppl_4k),
                format!("{:.0} %", 100.0 * row.passkey_4k),
                table::bytes(row.cache_bytes_1k),
                table::bytes(row.cache_bytes_4k),
                format!("{:.1} %", 100.0 * row.cache_bytes_4k as f64 / dense as f64),
                format!("{:.1}", row.decode_tokens_per_s_1k),
                format!("{:.1}", row.decode_tokens_per_s_4k),
            ]
        };
        let headers = [
            "model",
            "ppl 1k",
            "ppl 4k",
            "pass key 4k",
            "cache 1k",
            "cache 4k",
            "of dense",
            "tokens/s 1k",
            "tokens/s 4k",
        ];
        let rows: Vec<Vec<String>> = self.rows.iter().map(cells).collect();
        let mut lines = vec![table::render(&headers, &rows), String::new()];
        if let Some(closed) = self.gap_closed_4k {
            lines.push(format!(
                "Training closed {:.0} % of the student's log-perplexity gap to the teacher at 4k.",
                100.0 * closed
            ));
        }
        if let Some(Interval { mean, low, high }) = self.stage2_minus_window_only_4k {
            lines.push(format!(
                "Stage 2 minus window-only at 4k: {mean:+.4} nats a token (95 % interval {low:+.4} to {high:+.4})."
            ));
        }
        lines.push(format!(
            "Held out: {} tokens of {} in windows of {EVAL_WINDOW}; \"1k\" is each window's first 1024 \
             positions, which equals windows of 1024 because attention is causal.",
            self.setting.heldout_tokens,
            books::HELDOUT.title,
        ));
        for sample in &self.samples {
            lines.push(String::new());
            lines.push(format!(
                "{} ({}), asked {:?}:",
                label(&sample.model),
                sample.sampling,
                sample.prompt
            ));
            lines.push(format!("  {}", sample.text.trim().replace('\n', "\n  ")));
        }
        lines.push(String::new());
        lines.push(format!("Took {:.0} s on {} threads.", self.seconds, self.setting.threads));
        lines.join("\n")
    }
}

fn label(model: &str) -> &str {
    match model {
        "untrained" => "student, untrained",
        "stage1" => "student, stage 1",
        "stage2" => "student, stage 2",
        "window_only" => "window only",
        other => other,
    }
}
