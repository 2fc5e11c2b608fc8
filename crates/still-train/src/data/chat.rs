//! Conversations as the model sees them, and where the assistant's answers are in them.

use std::ops::Range;

use still_model::{ChatTemplate, Message, Tokenizer};

/// A conversation's token ids and, if asked for, the tokens that the assistant wrote.
///
/// # Errors
/// In words: a template that is missing, refuses the conversation, or writes earlier turns otherwise once later ones
/// follow (then no part of the text is an answer for certain).
pub(super) fn encode_conversation(
    messages: &[Message],
    tokenizer: &Tokenizer,
    answers: bool,
) -> Result<(Vec<u32>, Vec<Range<usize>>), String> {
    let template = tokenizer.chat_template().ok_or("the model has no chat template")?;
    let words = |error: still_model::ModelError| error.to_string();
    let text = template.render(messages, false).map_err(words)?;
    // The template writes what the tokenizer would add around a document.
    let (ids, offsets) = tokenizer.encode_with_offsets(&text, false).map_err(words)?;
    if !answers {
        return Ok((ids, Vec::new()));
    }
    let mut spans = Vec::new();
    for span in answer_bytes(messages, template, &text)? {
        let start = offsets.partition_point(|&(start, _)| start < span.start);
        let end = offsets.partition_point(|&(start, _)| start < span.end);
        if start < end {
            spans.push(start..end);
        }
    }
    Ok((ids, spans))
}

/// What the template writes after the opening of each of the assistant's turns, the end of the turn included.
fn answer_bytes(
    messages: &[Message],
    template: &ChatTemplate,
    text: &str,
) -> Result<Vec<Range<usize>>, String> {
    let render = |messages: &[Message], prompt| {
        template.render(messages, prompt).map_err(|error| error.to_string())
    };
    let mut spans = Vec::new();
    for (n, message) in messages.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        let before = render(&messages[..n], true)?;
        let after = render(&messages[..=n], false)?;
        if !after.starts_with(&before) || !text.starts_with(&after) {
            return Err(format!(
                "the chat template does not write message {} as a prompt and its continuation, so its answer cannot be told apart",
                n + 1
            ));
        }
        // Generation stops at the end of the turn: white space after it is the template's.
        spans.push(before.len()..after.trim_end().len().max(before.len()));
    }
    Ok(spans)
}
