//! Pass keys as items of a task.

use still_model::Tokenizer;

use super::LongOptions;
use super::draft::LongItem;
use super::judge::Judge;
use crate::error::Result;
use crate::passkey::PasskeyPrompts;
use crate::task::{Item, Question};

/// One item a key, the needle ever deeper; prompt and answer have `length` tokens together, or a few less.
pub(super) fn items(tokenizer: &Tokenizer, options: LongOptions) -> Result<Vec<Item>> {
    let LongOptions { length, items, seed, .. } = options;
    let answer_tokens = |prompts: &PasskeyPrompts| {
        prompts.prompts.iter().map(|prompt| prompt.answer_tokens).max().unwrap_or(0)
    };
    let allowance = answer_tokens(&PasskeyPrompts::new(tokenizer, length, items, seed)?);
    let length = length.saturating_sub(allowance);
    let prompts = PasskeyPrompts::new(tokenizer, length, items, seed)?;
    let item = |(index, prompt): (usize, &crate::passkey::PasskeyPrompt)| {
        let shared = &prompts.shared[..prompt.shared_tokens];
        let item = LongItem {
            prompt_ids: [shared, &prompt.rest].concat(),
            max_new_tokens: prompt.answer_tokens,
            targets: vec![prompt.key.clone()],
            judge: Judge::Digits,
        };
        Item {
            id: format!("passkey-{index}"),
            // All prompts begin alike.
            group: Some("passkey".into()),
            question: Question::Generation(Box::new(item)),
        }
    };
    Ok(prompts.prompts.iter().enumerate().map(item).collect())
}
