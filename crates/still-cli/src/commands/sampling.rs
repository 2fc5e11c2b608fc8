//! Sampling options of every command that generates.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use still_model::{Constraints, GenerateOptions, Model, SuggestedSampling};

use super::shape::Shape;
use crate::args::{TOKENS, number, seed, share, whole};
use crate::errors::user;
use crate::interrupt;

/// What a chat samples by if neither options nor the model's makers say anything. Small models repeat themselves when they are
/// greedy, and lose the thread where unlikely tokens are drawn.
const CHAT: SuggestedSampling = SuggestedSampling {
    temperature: 0.3,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.1,
    repetition_penalty: 1.1,
};

/// The repetition penalty of a greedy answer. Of 37 answers of the demo's student, greedy without one, 7 repeat themselves; with
/// 1.1 3 do, and the same 11 of 30 facts are found (docs/chat.md).
const ANSWER_PENALTY: f64 = 1.1;
/// Models of fewer weights than this get [`ANSWER_PENALTY`]: larger ones rarely repeat themselves.
const SMALL_MODEL: u64 = 1_000_000_000;

/// Most tokens of a text that is generated.
const MAX_NEW_TOKENS: usize = 256;
/// Most tokens of a chat's reply: whoever waits can cut it.
const MAX_REPLY_TOKENS: usize = 1024;

/// How the next token is chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Most tokens to generate [default: 256, of `still chat` 1024]
    #[arg(long, short = 'n', value_name = "N", value_parser = whole(0, TOKENS))]
    max_new_tokens: Option<usize>,
    /// 0 takes the likeliest token every time [default: 0, of `still chat` what the model's makers suggest, else 0.3]
    #[arg(long, value_name = "T", value_parser = number(0.0, 1e6))]
    temperature: Option<f64>,
    /// Sample among this many of the likeliest tokens
    #[arg(long, value_name = "K", value_parser = whole(1, TOKENS))]
    top_k: Option<usize>,
    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f64>,
    /// Sample among tokens that have at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", value_parser = number(0.0, 1.0))]
    min_p: Option<f64>,
    /// Divide the logits of tokens that were generated already (multiply negative ones); 1 is off [default: 1; of `still ask` 1.1
    /// for models below 1 billion weights; of `still chat` as --temperature]
    #[arg(long, value_name = "R", value_parser = number(0.01, 100.0))]
    repetition_penalty: Option<f64>,
    /// Subtract this from the logits of tokens that were generated already
    #[arg(long, value_name = "A", default_value_t = 0.0, value_parser = number(-100.0, 100.0))]
    presence_penalty: f64,
    /// Subtract this from a token's logit for each time it was generated
    #[arg(long, value_name = "A", default_value_t = 0.0, value_parser = number(-100.0, 100.0))]
    frequency_penalty: f64,
    /// Add this, from -100 to 100, to the logit of a token, by its id; may be repeated
    #[arg(long, value_name = "ID=BIAS", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the sampling
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = seed)]
    seed: u64,
    /// End when this text appears (it is not printed); may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Write JSON that follows the JSON schema in this file
    #[arg(long, value_name = "FILE", conflicts_with = "grammar")]
    json_schema: Option<PathBuf>,
    /// Write a text of the grammar in this file, in llguidance's variant of Lark
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

/// A token's id and what its logit gets, as OpenAI bounds it.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').unwrap_or_default();
    let id = id.parse().map_err(|_| "it must be a token's id, `=` and a number".to_owned())?;
    Ok((id, number(-100.0, 100.0)(bias)? as f32))
}

/// What options leave open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usual {
    /// The likeliest token every time: the same answer every time.
    Greedy,
    /// The same, with a penalty that keeps a small model from repeating itself.
    Answer,
    /// What the model's makers suggest, or what suits a small model.
    Chat,
}

/// How tokens are chosen, but for what depends on the model.
#[derive(Clone, Debug)]
pub struct Sampling {
    args: SamplingArgs,
    usual: Usual,
    shape: Option<Shape>,
}

impl SamplingArgs {
    /// Checks the options.
    ///
    /// # Errors
    /// Options that do nothing, or end a generation before it begins; a schema or a grammar that cannot be read.
    pub fn resolve(self, usual: Usual) -> anyhow::Result<Sampling> {
        let greedy = match (self.temperature, usual) {
            (Some(temperature), _) => temperature == 0.0,
            (None, usual) => usual != Usual::Chat,
        };
        let filters = [self.top_p.is_some(), self.top_k.is_some(), self.min_p.is_some()];
        if greedy && filters.contains(&true) {
            return Err(user(
                "--top-p, --top-k and --min-p do nothing at temperature 0",
                "add --temperature, such as 0.7",
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(user("an empty --stop would end at once", "give the text to stop at"));
        }
        let shape = Shape::read(self.json_schema.as_deref(), self.grammar.as_deref())?;
        Ok(Sampling { args: self, usual, shape })
    }
}

impl Sampling {
    /// Options for one model.
    ///
    /// # Errors
    /// A suggestion of its makers that is out of range; a schema or a grammar that is malformed; a bias of a token that it does not
    /// have.
    pub fn options(&self, model: &Model) -> anyhow::Result<GenerateOptions> {
        let Self { args, usual, shape } = self;
        let vocabulary = model.config().vocab_size;
        if let Some((id, _)) = args.logit_bias.iter().find(|(id, _)| *id as usize >= vocabulary) {
            return Err(user(
                format!("--logit-bias: there is no token {id}"),
                format!("the model's ids are below {vocabulary}"),
            ));
        }
        let constraints = match shape {
            Some(shape) => shape.constraints(model)?,
            None => Constraints::default(),
        };
        let off = GenerateOptions::default();
        let greedy = SuggestedSampling {
            temperature: off.temperature,
            top_k: off.top_k,
            top_p: off.top_p,
            min_p: off.min_p,
            repetition_penalty: off.repetition_penalty,
        };
        let (usual, max_new_tokens) = match usual {
            Usual::Greedy => (greedy, MAX_NEW_TOKENS),
            // Whoever asks for a temperature gets that and no more.
            Usual::Answer if args.temperature.is_none() && is_small(model)? => {
                (SuggestedSampling { repetition_penalty: ANSWER_PENALTY, ..greedy }, MAX_NEW_TOKENS)
            }
            Usual::Answer => (greedy, MAX_NEW_TOKENS),
            // Whoever asks for the likeliest token gets it.
            Usual::Chat if args.temperature == Some(0.0) => (greedy, MAX_REPLY_TOKENS),
            Usual::Chat => {
                let suggested = model.suggested_sampling();
                let suggested = suggested.context("generation_config.json")?;
                (suggested.unwrap_or(CHAT), MAX_REPLY_TOKENS)
            }
        };
        Ok(GenerateOptions {
            max_new_tokens: args.max_new_tokens.unwrap_or(max_new_tokens),
            temperature: args.temperature.unwrap_or(usual.temperature),
            top_k: args.top_k.unwrap_or(usual.top_k),
            top_p: args.top_p.unwrap_or(usual.top_p),
            min_p: args.min_p.unwrap_or(usual.min_p),
            repetition_penalty: args.repetition_penalty.unwrap_or(usual.repetition_penalty),
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
            logit_bias: args.logit_bias.clone(),
            constraints,
            seed: args.seed,
            stop: args.stop.clone(),
            cancel: interrupt::flag(),
            ..off
        })
    }
}

fn is_small(model: &Model) -> anyhow::Result<bool> {
    Ok(model.decoder.elements()? < SMALL_MODEL)
}

/// Sampling in a few words: `temperature 0.7, top-p 0.9`.
pub fn in_words(options: &GenerateOptions) -> String {
    let off = GenerateOptions::default();
    let mut words = match options.temperature {
        0.0 => "greedy".to_owned(),
        temperature => format!("temperature {temperature}"),
    };
    if options.top_k != off.top_k {
        let _ = write!(words, ", top-k {}", options.top_k);
    }
    for (name, value, off) in [
        ("top-p", options.top_p, off.top_p),
        ("min-p", options.min_p, off.min_p),
        ("repetition penalty", options.repetition_penalty, off.repetition_penalty),
        ("presence penalty", options.presence_penalty, off.presence_penalty),
        ("frequency penalty", options.frequency_penalty, off.frequency_penalty),
    ] {
        if value != off {
            let _ = write!(words, ", {name} {value}");
        }
    }
    for (id, bias) in &options.logit_bias {
        let _ = write!(words, ", bias of token {id} {bias}");
    }
    if !options.constraints.are_off() {
        words.push_str(", what the schema or grammar allows");
    }
    words
}
