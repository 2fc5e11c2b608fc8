//! How the next token is chosen.

use clap::Args;
use still_attention::RowDtype;
use still_model::GenerateOptions;

use super::rows::{Rows, cache_dtype};
use crate::args::{TOKENS, number, seed, share, whole};
use crate::errors::user;
use crate::interrupt;

/// How the next token is chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 256, value_parser = whole(0, TOKENS))]
    max_new_tokens: usize,
    /// 0 takes the likeliest token every time
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = number(0.0, 1e6))]
    temperature: f64,
    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f64>,
    /// Sample among this many of the likeliest tokens
    #[arg(long, value_name = "K", value_parser = whole(1, TOKENS))]
    top_k: Option<usize>,
    /// Seed of the sampling
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed)]
    seed: u64,
    /// End when this text appears (it is not printed); may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// How the attention cache stores exact keys and values (of int8 a student's window stays bf16) [default: bf16; on CUDA
    /// as --compute-dtype]
    #[arg(long, value_name = "FORMAT", value_parser = cache_dtype())]
    cache_dtype: Option<RowDtype>,
}

/// What a generation goes by.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// How tokens are chosen and when that ends.
    pub options: GenerateOptions,
    /// How the cache stores exact rows.
    pub rows: Rows,
}

impl SamplingArgs {
    /// Checks the options.
    ///
    /// # Errors
    /// Options that do nothing, or end a generation before it begins.
    pub fn resolve(self) -> anyhow::Result<Sampling> {
        if self.temperature == 0.0 && (self.top_p.is_some() || self.top_k.is_some()) {
            return Err(user(
                "--top-p and --top-k do nothing at temperature 0",
                "add --temperature, such as 0.7",
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(user("an empty --stop would end at once", "give the text to stop at"));
        }
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            seed: self.seed,
            stop: self.stop,
            cancel: interrupt::flag(),
        };
        Ok(Sampling { options, rows: Rows::new(self.cache_dtype, RowDtype::Bf16) })
    }
}
