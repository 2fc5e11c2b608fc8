//! Compression of a dense model's attention cache, to compare students with at equal bytes.
//!
//! The model reads a context with full attention. Then each KV head drops rows of K and V by a published rule, and what comes
//! after attends exactly to the rows that are left and to its own tokens. Nothing is trained. Every token keeps its position.
//!
//! When a question comes into it decides what a number means. A method that is not prompt-aware compresses a context that
//! anything may be asked about: before the question is read. A prompt-aware method ([`Method::sees_question`]) drops what this
//! one question does not need. [`crate::run`] cuts each kind of question accordingly (docs/evaluation.md has the table).
//!
//! | file | content |
//! |---|---|
//! | `context` | reads a context, and compresses what was read |
//! | `scores` | what the attention of the context's own tokens says of each row |
//! | `reconstruction` | KVzip's scores: the attention of the context repeated |
//! | `retrieval` | which heads look back: scores of heads for DuoAttention's form |
//! | `select` | which rows stay |
//! | `cache` | the rows that stayed, and reading on with them |
//! | `attention` | softmax attention over rows, in tensor operations that every device has |
//! | `naive`, `tests` | all of it in float64, one number at a time, and what it is compared with |
//! | `device_tests` | scores, selection and reading on of a GPU compared with the CPU's |

mod attention;
mod cache;
mod context;
#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod naive;
mod reconstruction;
mod retrieval;
mod scores;
mod select;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{EvalError, Result};

pub(crate) use cache::CompressedCache;
pub(crate) use context::Compressor;

/// A published rule by which heads drop rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// SnapKV (arXiv 2404.14469, section 4; the authors' runs on LongBench take the largest of 7 neighbors and observe 32 tokens): the last tokens of
    /// the prompt, with the question in it, say which rows they attend to. The same number of rows a head.
    #[serde(rename = "snapkv")]
    SnapKv,
    /// KVzip (arXiv 2505.23416, section 3): the model is made to repeat the context; a row's score is the largest attention
    /// that it gets meanwhile. The best rows of all heads and layers together.
    #[serde(rename = "kvzip")]
    KvZip,
    /// The form of DuoAttention (arXiv 2410.10819, section 2): retrieval heads keep everything, the others attention sinks and
    /// a window. The authors train which heads are which; here it is measured, see `retrieval`.
    DuoAttention,
    /// H2O (arXiv 2306.14048, section 4): half of the rows are those with the most attention from the context's tokens, half the
    /// most recent ones.
    #[serde(rename = "h2o")]
    H2o,
    /// StreamingLLM (arXiv 2309.17453, section 3): the first four rows and the most recent ones. The published method counts
    /// positions within its cache; here tokens keep theirs.
    #[serde(rename = "streaming_llm")]
    StreamingLlm,
    /// As many rows, at random: what a rule must beat.
    Random,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::SnapKv,
        Self::KvZip,
        Self::DuoAttention,
        Self::H2o,
        Self::StreamingLlm,
        Self::Random,
    ];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::SnapKv => "snapkv",
            Self::KvZip => "kvzip",
            Self::DuoAttention => "duo_attention",
            Self::H2o => "h2o",
            Self::StreamingLlm => "streaming_llm",
            Self::Random => "random",
        }
    }

    /// Whether it is prompt-aware: it knows the question when it drops rows.
    pub fn sees_question(self) -> bool {
        self == Self::SnapKv
    }
}

/// A method, and the share of the context's rows that stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Compression {
    /// By which rule.
    pub method: Method,
    /// Above 0, at most 1: of the rows of all heads and layers, and so of the dense cache's bytes.
    pub fraction: f64,
}

impl FromStr for Compression {
    type Err = EvalError;

    fn from_str(text: &str) -> Result<Self> {
        let names = || Method::ALL.map(Method::name).join(", ");
        let wrong = |what: String| Err(EvalError::Argument(what));
        let Some((name, fraction)) = text.split_once(':') else {
            return wrong(format!("{text:?} is no METHOD:FRACTION; methods are {}", names()));
        };
        let Some(method) = Method::ALL.into_iter().find(|method| method.name() == name) else {
            return wrong(format!("no compression is called {name:?}: use one of {}", names()));
        };
        match fraction.parse() {
            Ok(fraction) if fraction > 0.0 && fraction <= 1.0 => Ok(Self { method, fraction }),
            _ => wrong(format!("{fraction:?} is no share of a cache above 0 and at most 1")),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.method.name(), self.fraction)
    }
}

#[cfg(test)]
mod name_tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for method in Method::ALL {
            let compression = Compression { method, fraction: 0.1 };
            assert_eq!(compression.to_string().parse::<Compression>().unwrap(), compression);
            let json = serde_json::to_value(method).unwrap();
            assert_eq!(json, method.name());
        }
        for wrong in ["snapkv", "pyramid:0.1", "h2o:0", "h2o:1.5", "h2o:nan", "h2o:"] {
            assert!(wrong.parse::<Compression>().is_err(), "{wrong}");
        }
    }
}
