//! Arguments of `still demo`.

use std::path::PathBuf;

use clap::Args;

use crate::args::{COUNT, seed, whole};
use crate::errors::user;

const EXAMPLES: &str = "\
Examples:
  still demo
  still demo --full --json
  still demo --model my-student
  still demo --train --out demo-student
  still demo --train --model small-model --transfer-steps 20 --json";

/// Held-out windows of `--train`.
const WINDOWS: usize = 2;
/// The same with `--full`.
const FULL_WINDOWS: usize = 8;

/// `still demo`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DemoArgs {
    /// Train a student here instead, and show what each step bought
    #[arg(long)]
    pub train: bool,
    /// Measure more: perplexity and pass keys of 4096 tokens; with --train 8 held-out windows and a student with nothing but
    /// the window
    #[arg(long)]
    pub full: bool,
    /// Print one JSON object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
    /// Delta student to compare with its teacher instead of the one that ships; with --train the base to linearize instead of the
    /// pinned SmolLM2-135M-Instruct
    #[arg(long, short, value_name = "MODEL")]
    pub model: Option<String>,
    /// Stage 1 steps, each of one window of 1024 tokens
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = whole(0, COUNT), requires = "train")]
    pub transfer_steps: usize,
    /// Stage 2 steps, each of one window of 1024 tokens
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = whole(0, COUNT), requires = "train")]
    pub finetune_steps: usize,
    /// Held-out windows of 4096 tokens [default: 2, with --full 8]
    #[arg(long, value_name = "N", value_parser = whole(0, COUNT), requires = "train")]
    windows: Option<usize>,
    /// Pass keys to ask each model for
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = whole(0, COUNT), requires = "train")]
    pub keys: usize,
    /// Decode steps timed at each context
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = whole(0, COUNT), requires = "train")]
    pub decode_steps: usize,
    /// Seed of everything
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed)]
    pub seed: u64,
    /// Keep the trained student here
    #[arg(long, short, value_name = "DIR", requires = "train")]
    pub out: Option<PathBuf>,
}

impl DemoArgs {
    /// Held-out windows of `--train`.
    pub fn windows(&self) -> usize {
        self.windows.unwrap_or(if self.full { FULL_WINDOWS } else { WINDOWS })
    }

    /// # Errors
    /// Counts of nothing; a place that is taken.
    pub fn check(&self) -> anyhow::Result<()> {
        let counts = [
            ("--transfer-steps", self.transfer_steps),
            ("--finetune-steps", self.finetune_steps),
            ("--keys", self.keys),
            ("--decode-steps", self.decode_steps),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(user(format!("{name} 0 leaves nothing to do"), "use 1 or more"));
        }
        match &self.out {
            Some(out) if out.exists() => Err(user(
                format!("{} exists already", out.display()),
                "name a new directory for --out",
            )),
            _ => Ok(()),
        }
    }
}
