//! Pass keys: five digits hidden in filler sentences.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use still_model::Tokenizer;

use super::LongOptions;
use super::draft::LongItem;
use super::judge::Judge;
use crate::error::{EvalError, Result};
use crate::task::{Item, Question};

const INTRO: &str = "There is an important piece of information hidden inside a lot of irrelevant text. \
    Find it and memorize it. I will quiz you about the important information there.\n\n";
const FILLER: &str = " The grass is green. The sky is blue. The sun is yellow. Here we go. \
    There and back again.";
/// Ends in a space, so that the next token is a digit. Without it a model that knows the key may go on in words ("the pass
/// key"): SmolLM2-135M does in half of its answers, and what is measured then is its phrasing.
const QUESTION: &str = "\n\nWhat is the pass key? The pass key is ";

/// A hidden key.
struct Key {
    digits: String,
    /// Tokens of the sentences that tell it.
    needle: Vec<u32>,
    /// Greedy tokens enough to spell it.
    answer_tokens: usize,
}

impl Key {
    fn new(tokenizer: &Tokenizer, rng: &mut ChaCha8Rng) -> Result<Self> {
        let digits = rng.random_range(10_000..100_000).to_string();
        let needle = format!(" The pass key is {digits}. Remember it. {digits} is the pass key.");
        let answer_tokens = tokenizer.encode(&format!(" {digits}."), false)?.len();
        Ok(Self { digits, needle: tokenizer.encode(&needle, false)?, answer_tokens })
    }
}

/// One item a key, at the middles of equal parts of the prompt. A prompt has `length` tokens less those of the longest answer.
/// All prompts begin alike up to their needles, each needle deeper than the one before.
pub(super) fn items(tokenizer: &Tokenizer, options: LongOptions) -> Result<Vec<Item>> {
    let LongOptions { length, items, seed, .. } = options;
    let intro = tokenizer.encode(INTRO, true)?;
    let filler = tokenizer.encode(FILLER, false)?;
    let question = tokenizer.encode(QUESTION, false)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let keys: Vec<Key> =
        (0..items).map(|_| Key::new(tokenizer, &mut rng)).collect::<Result<_>>()?;
    let allowance = keys.iter().map(|key| key.answer_tokens).max().unwrap_or(0);
    let hay = |tokens: usize| filler.iter().copied().cycle().take(tokens);
    let mut before = 0;
    let item = |(index, key): (usize, Key)| {
        let fixed = intro.len() + key.needle.len() + question.len() + allowance;
        let Some(all) = length.checked_sub(fixed).filter(|&all| all >= filler.len()) else {
            let needed = fixed + filler.len();
            return Err(EvalError::TooShort { what: "a pass-key prompt", needed, got: length });
        };
        // Needles lie between sentences: whole runs of filler come before them.
        let depth = (all as f64 * (index as f64 + 0.5) / items as f64) as usize;
        before = (depth / filler.len() * filler.len()).max(before);
        let mut prompt_ids = intro.clone();
        prompt_ids.extend(hay(before).chain(key.needle).chain(hay(all - before)));
        let context_tokens = prompt_ids.len();
        prompt_ids.extend(&question);
        let item = LongItem {
            prompt_ids,
            context_tokens,
            max_new_tokens: key.answer_tokens,
            targets: vec![key.digits],
            judge: Judge::Digits,
        };
        Ok(Item {
            id: format!("passkey-{index}"),
            group: Some("passkey".into()),
            question: Question::Generation(Box::new(item)),
        })
    };
    keys.into_iter().enumerate().map(item).collect()
}
