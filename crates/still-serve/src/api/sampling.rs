//! Fields of both kinds of completion: sampling, stop conditions, how the answer is sent.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use serde::Deserialize;
use serde_json::Value;
use still_model::{GenerateOptions, Model, SuggestedSampling};

use super::error::{ApiError, Result};

/// Fields of both kinds of completion.
#[derive(Clone, Debug, Default, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct Common {
    /// The model's name. Default: the served model.
    pub model: Option<String>,
    /// Temperature; 0 takes the likeliest token. Default: the suggestion of the model's files, else 1.
    pub temperature: Option<f64>,
    /// Draw from the likeliest tokens that together have this probability.
    pub top_p: Option<f64>,
    /// Draw from this many of the likeliest tokens; 0 and -1 are off.
    pub top_k: Option<i64>,
    /// Draw from tokens with at least this share of the likeliest one's probability.
    pub min_p: Option<f64>,
    /// -2 to 2: subtracted from the logits of tokens that were generated.
    pub presence_penalty: Option<f64>,
    /// -2 to 2: subtracted from a token's logit for each time that it was generated.
    pub frequency_penalty: Option<f64>,
    /// Divides the logits of tokens that were generated; 1 is off.
    pub repetition_penalty: Option<f64>,
    /// -100 to 100 by token id: added to the token's logit.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Seed of the sampling. Default: a random one for each request.
    pub seed: Option<i64>,
    /// Up to 16 texts that end the answer. The answer does not contain them.
    pub stop: Option<Stop>,
    /// Number of answers to each prompt.
    pub n: Option<usize>,
    /// Send the answer as server-sent events.
    #[serde(default)]
    pub stream: Option<bool>,
    /// Options of a stream.
    pub stream_options: Option<StreamOptions>,
    /// Continue after end-of-sequence tokens, up to the limit of new tokens.
    pub ignore_eos: Option<bool>,
    /// `text`, `json_object`, or `json_schema` with a schema.
    #[cfg_attr(test, schema(value_type = Option<Object>))]
    pub response_format: Option<Value>,
    /// A grammar in llguidance's variant of Lark that the answer must follow.
    pub grammar: Option<String>,
    /// Keep the state after the answer under this name.
    pub save_state: Option<String>,
}

/// Texts that end an answer.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum Stop {
    /// A text.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// Options of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct StreamOptions {
    /// Send the usage in the last chunk.
    pub include_usage: Option<bool>,
}

/// Most answers to one request, over all prompts.
pub const MOST_CHOICES: usize = 128;
/// Texts that end an answer, at most, and the bytes of each.
const MOST_STOPS: (usize, usize) = (16, 1024);

/// Fields of other servers that would change the answer, and what to use instead. They are refused. Other unknown fields are
/// ignored, as OpenAI's clients expect.
const REFUSED: [(&str, &str); 17] = [
    ("audio", "this server answers in text"),
    ("best_of", "use `n`"),
    ("continue_final_message", "use /v1/completions with the rendered text"),
    ("function_call", "use `tools` and `tool_choice`"),
    ("functions", "use `tools`"),
    ("guided_choice", "use `grammar`"),
    ("guided_grammar", "use `grammar`"),
    ("guided_json", "use `response_format`"),
    ("guided_regex", "use `grammar`"),
    ("min_tokens", "use `ignore_eos` or `logit_bias`"),
    ("modalities", "this server answers in text"),
    ("stop_token_ids", "use `stop`"),
    ("structured_outputs", "use `response_format` or `grammar`"),
    ("suffix", "this server continues a text at its end"),
    ("typical_p", "use `min_p` or `top_p`"),
    ("use_beam_search", "use `n`"),
    ("web_search_options", "this server searches nothing"),
];

/// Refuses fields that would change the answer.
///
/// # Errors
/// 400 for the first one.
pub fn refuse_unsupported(request: &Value) -> Result<()> {
    let refused = REFUSED.iter().find(|(name, _)| match (*name, &request[*name]) {
        (_, Value::Null | Value::Bool(false)) => false,
        ("min_tokens", Value::Number(number)) => number.as_f64() != Some(0.0),
        (_, Value::Number(number)) => number.as_f64() != Some(1.0),
        ("function_call", Value::String(text)) => text != "auto",
        (_, Value::String(text)) => !text.is_empty(),
        ("modalities", Value::Array(items)) => items.iter().any(|item| item != "text"),
        (_, Value::Array(items)) => !items.is_empty(),
        (_, Value::Bool(true) | Value::Object(_)) => true,
    });
    match refused {
        Some((name, instead)) => {
            Err(ApiError::unsupported(name, format!("`{name}` is not supported: {instead}")))
        }
        None => Ok(()),
    }
}

impl Common {
    /// Sampling options. The caller sets `max_new_tokens`.
    ///
    /// # Errors
    /// 400 for a value that is out of range.
    pub fn options(&self, model: &Model, suggested: &SuggestedSampling) -> Result<GenerateOptions> {
        let top_k = match self.top_k {
            None => suggested.top_k,
            Some(-1) => 0,
            Some(k) => usize::try_from(k).map_err(|_| {
                ApiError::invalid("top_k", format!("top_k {k} is not a number from 1 up, 0 or -1"))
            })?,
        };
        let number = |name: &str, given: Option<f64>, from: f64, to: f64, usual: f64| match given {
            Some(value) if !(from..=to).contains(&value) => {
                let what = format!("{name} {value} is not from {from} to {to}");
                Err(ApiError::invalid(name, what))
            }
            given => Ok(given.unwrap_or(usual)),
        };
        let options = GenerateOptions {
            temperature: number(
                "temperature",
                self.temperature,
                0.0,
                100.0,
                suggested.temperature,
            )?,
            top_p: number("top_p", self.top_p, 1e-9, 1.0, suggested.top_p)?,
            top_k,
            min_p: number("min_p", self.min_p, 0.0, 1.0, suggested.min_p)?,
            repetition_penalty: number(
                "repetition_penalty",
                self.repetition_penalty,
                0.01,
                100.0,
                suggested.repetition_penalty,
            )?,
            presence_penalty: number("presence_penalty", self.presence_penalty, -2.0, 2.0, 0.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, 0.0)?,
            logit_bias: self.biases(model)?,
            seed: self.seed.map_or_else(any_seed, |seed| seed as u64),
            stop: self.stops()?,
            ..GenerateOptions::default()
        };
        options.validate().map_err(|error| {
            ApiError::client(
                axum::http::StatusCode::BAD_REQUEST,
                "invalid_value",
                error.to_string(),
            )
        })?;
        Ok(options)
    }

    fn biases(&self, model: &Model) -> Result<Vec<(u32, f32)>> {
        let vocabulary = model.config().vocab_size;
        let all = self.logit_bias.iter().flatten();
        all.map(|(key, &bias)| {
            let id = key.parse().ok().filter(|&id: &u32| (id as usize) < vocabulary);
            let id = id.ok_or_else(|| {
                let what = format!("logit_bias: {key:?} is no token id below {vocabulary}");
                ApiError::invalid("logit_bias", what)
            })?;
            match (-100.0..=100.0).contains(&bias) {
                true => Ok((id, bias as f32)),
                false => {
                    let what = format!("logit_bias: {bias} is not from -100 to 100");
                    Err(ApiError::invalid("logit_bias", what))
                }
            }
        })
        .collect()
    }

    fn stops(&self) -> Result<Vec<String>> {
        let stops = match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text],
            Some(Stop::Several(texts)) => texts,
        };
        let (most, bytes) = MOST_STOPS;
        if stops.len() > most {
            return Err(ApiError::invalid("stop", format!("more than {most} texts to stop at")));
        }
        if stops.iter().any(|stop| stop.is_empty() || stop.len() > bytes) {
            let what = format!("a text to stop at is empty, or has more than {bytes} bytes");
            return Err(ApiError::invalid("stop", what));
        }
        Ok(stops)
    }

    /// Number of answers to each of `prompts` prompts.
    ///
    /// # Errors
    /// 400 for none, or too many; for several whose states would have one name.
    pub fn choices(&self, prompts: usize) -> Result<usize> {
        let n = self.n.unwrap_or(1);
        match n.saturating_mul(prompts) {
            0 => Err(ApiError::invalid("n", "no answer is asked for")),
            2.. if self.save_state.is_some() => {
                Err(ApiError::invalid("save_state", "only a single answer can be saved"))
            }
            1..=MOST_CHOICES => Ok(n),
            all => {
                let what = format!("{all} answers are asked for; the most is {MOST_CHOICES}");
                Err(ApiError::invalid("n", what))
            }
        }
    }

    /// Whether the answer comes as events.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with the usage.
    pub fn tells_usage(&self) -> bool {
        self.stream_options.and_then(|options| options.include_usage).unwrap_or(false)
    }
}

/// Defaults of the sampling: suggestions of the model's files, else OpenAI's values.
pub fn usual_sampling(model: &Model) -> still_model::Result<SuggestedSampling> {
    let openai = SuggestedSampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
    };
    Ok(model.suggested_sampling()?.unwrap_or(openai))
}

/// A random seed, for a request without one.
pub fn any_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_that_would_change_the_answer_are_refused_by_name() {
        for request in [
            json!({ "guided_json": {} }),
            json!({ "best_of": 3 }),
            json!({ "suffix": "end" }),
            json!({ "functions": [{ "name": "f" }] }),
            json!({ "min_tokens": 1 }),
            json!({ "modalities": ["audio"] }),
            json!({ "use_beam_search": true }),
        ] {
            let error = refuse_unsupported(&request).unwrap_err();
            let error = serde_json::to_value(error.body()).unwrap();
            let name = request.as_object().unwrap().keys().next().unwrap();
            assert_eq!(&error["error"]["param"], name);
        }
        let harmless = json!({
            "user": "me", "best_of": 1, "suffix": null, "functions": [], "min_tokens": 0, "modalities": ["text"],
            "use_beam_search": false, "function_call": "auto", "no_such_field": 3,
        });
        assert!(refuse_unsupported(&harmless).is_ok());
    }

    #[test]
    fn seeds_differ_where_none_is_named() {
        assert_ne!(any_seed(), any_seed());
    }
}
