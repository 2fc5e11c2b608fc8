//! Log-probabilities as chats tell them.

use serde::Serialize;

use super::app::App;
use crate::TokenLogprobs;

/// JSON has no −∞; OpenAI writes this.
const LEAST: f32 = -9999.0;

/// A log-probability that JSON can tell.
pub fn clamped(log_prob: f32) -> f64 {
    f64::from(log_prob.max(LEAST))
}

/// Log-probabilities of an answer.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ChatLogprobs {
    /// One for each token.
    pub content: Vec<ChatToken>,
}

/// A token of an answer.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct ChatToken {
    #[serde(flatten)]
    token: TopToken,
    /// The likeliest in its place.
    top_logprobs: Vec<TopToken>,
}

/// A token and its log-probability.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(utoipa::ToSchema))]
pub struct TopToken {
    token: String,
    logprob: f64,
    /// A token may be a part of a character.
    bytes: Vec<u8>,
}

impl ChatToken {
    /// As the engine tells it.
    pub fn of(app: &App, token: &TokenLogprobs) -> Self {
        let one = |id, log_prob| TopToken {
            token: app.token_string(id),
            logprob: clamped(log_prob),
            bytes: app.token_bytes(id),
        };
        Self {
            token: one(token.id, token.logprob),
            top_logprobs: token.top.iter().map(|&(id, log_prob)| one(id, log_prob)).collect(),
        }
    }
}
