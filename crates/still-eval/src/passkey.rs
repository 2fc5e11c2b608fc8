//! Pass-key prompts: a five-digit key hidden in a haystack of filler sentences.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use still_model::Tokenizer;

use crate::error::{EvalError, Result};

const INTRO: &str = "There is an important piece of information hidden inside a lot of irrelevant text. \
    Find it and memorize it. I will quiz you about the important information there.\n\n";
const FILLER: &str = " The grass is green. The sky is blue. The sun is yellow. Here we go. \
    There and back again.";
/// Ends in a space, so that the next token is a digit. Without it a model that knows the key may go on in words ("the pass
/// key"): SmolLM2-135M does in half of its answers, and what is measured then is its phrasing.
const QUESTION: &str = "\n\nWhat is the pass key? The pass key is ";

/// Prompts that share their beginning: everything before a prompt's needle is a prefix of one filler run.
#[derive(Clone, Debug)]
pub struct PasskeyPrompts {
    /// Tokens of every whole prompt.
    pub length: usize,
    /// The introduction and as many filler tokens as any prompt needs before its needle.
    pub shared: Vec<u32>,
    /// One prompt per key, the needle ever deeper.
    pub prompts: Vec<PasskeyPrompt>,
}

/// One prompt: `shared[..shared_tokens]` followed by `rest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PasskeyPrompt {
    /// The hidden key.
    pub key: String,
    /// Tokens of the shared beginning that come before the needle.
    pub shared_tokens: usize,
    /// Needle, filler and question.
    pub rest: Vec<u32>,
    /// Greedy tokens enough to spell the key.
    pub answer_tokens: usize,
}

/// What a model answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PasskeyAnswer {
    /// The hidden key.
    pub key: String,
    /// The decoded answer.
    pub answer: String,
    /// Whether the answer begins with the key.
    pub right: bool,
}

impl PasskeyPrompts {
    /// `keys` prompts of exactly `length` tokens; the needles lie at the middles of `keys` equal parts.
    ///
    /// # Errors
    /// If `length` cannot hold the introduction, a needle, the question and some filler.
    pub fn new(tokenizer: &Tokenizer, length: usize, keys: usize, seed: u64) -> Result<Self> {
        let intro = tokenizer.encode(INTRO, true)?;
        let filler = tokenizer.encode(FILLER, false)?;
        let question = tokenizer.encode(QUESTION, false)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut shared = intro.clone();
        let mut prompts = Vec::with_capacity(keys);
        let mut deepest = 0;
        for index in 0..keys {
            let key = rng.random_range(10_000..100_000).to_string();
            let needle = format!(" The pass key is {key}. Remember it. {key} is the pass key.");
            let needle = tokenizer.encode(&needle, false)?;
            let fixed = intro.len() + needle.len() + question.len();
            let Some(hay) = length.checked_sub(fixed).filter(|&hay| hay >= filler.len()) else {
                let needed = fixed + filler.len();
                return Err(EvalError::TooShort { what: "a pass-key prompt", needed, got: length });
            };
            // Needles lie between sentences: whole runs of filler come before them.
            let depth = (hay as f64 * (index as f64 + 0.5) / keys as f64) as usize;
            let before = (depth / filler.len() * filler.len()).max(deepest);
            deepest = before;
            let shared_tokens = intro.len() + before;
            while shared.len() < shared_tokens {
                shared.extend(&filler);
            }
            let after = filler.iter().copied().cycle().take(hay - before);
            let rest = needle.into_iter().chain(after).chain(question.iter().copied()).collect();
            let answer_tokens = tokenizer.encode(&format!(" {key}."), false)?.len();
            prompts.push(PasskeyPrompt { key, shared_tokens, rest, answer_tokens });
        }
        Ok(Self { length, shared, prompts })
    }

    /// Tokens that asking for every key reads, the shared beginning once.
    pub fn tokens_to_read(&self) -> usize {
        self.shared.len() + self.prompts.iter().map(|prompt| prompt.rest.len()).sum::<usize>()
    }
}

impl PasskeyPrompt {
    /// Judges a decoded answer.
    pub fn judge(&self, answer: &str) -> PasskeyAnswer {
        let digits: String = answer.trim_start().chars().take_while(char::is_ascii_digit).collect();
        let right = digits == self.key;
        PasskeyAnswer { key: self.key.clone(), answer: answer.to_owned(), right }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> PasskeyPrompt {
        PasskeyPrompt { key: "12345".into(), shared_tokens: 0, rest: vec![], answer_tokens: 6 }
    }

    #[test]
    fn only_the_whole_key_is_right() {
        assert!(prompt().judge(" 12345.").right);
        assert!(prompt().judge("12345").right);
        assert!(!prompt().judge(" 1234").right);
        assert!(!prompt().judge(" 123456").right);
        assert!(!prompt().judge(" the key 12345").right);
        assert!(!prompt().judge("").right);
    }
}
