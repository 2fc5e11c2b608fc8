//! Conversations as the model sees them, and where the assistant's answers are in them.

use std::ops::Range;

use serde_json::{Map, Value};
use still_model::{ChatTemplate, Context, Message, Rendered, Tokenizer};

/// A line's messages and what else it gives the template.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversation {
    pub messages: Vec<Message>,
    pub context: Context,
}

/// Keys besides `messages` that a template is given; datasets have many others, which are nobody's words.
pub(super) const BESIDE: [&str; 3] = ["tools", "documents", "chat_template_kwargs"];

impl Conversation {
    /// From a line's `messages` and the values of [`BESIDE`], of which each may be missing or null.
    ///
    /// # Errors
    /// In words: a value of another type.
    pub fn new(messages: Value, beside: [Option<Value>; 3]) -> Result<Self, String> {
        let messages =
            serde_json::from_value(messages).map_err(|error| format!("\"messages\": {error}"))?;
        let [tools, documents, variables] = beside.map(|value| value.filter(|v| !v.is_null()));
        let variables = match variables {
            None => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(_) => return Err(format!("\"{}\" is not an object", BESIDE[2])),
        };
        let context = Context {
            tools: tools.map(|tools| objects(tools, BESIDE[0])).transpose()?,
            documents: documents.map(|documents| objects(documents, BESIDE[1])).transpose()?,
            variables,
        };
        Ok(Self { messages, context })
    }
}

/// A list of objects, perhaps as JSON in a string: tables of one type for a column keep them so.
fn objects(value: Value, key: &str) -> Result<Vec<Value>, String> {
    let value = match value {
        Value::String(json) => {
            serde_json::from_str(&json).map_err(|error| format!("\"{key}\": {error}"))?
        }
        value => value,
    };
    match value {
        Value::Array(items) if items.iter().all(Value::is_object) => Ok(items),
        _ => Err(format!("\"{key}\" is not a list of objects")),
    }
}

/// A conversation's token ids and, if asked for, the tokens that the assistant wrote.
///
/// # Errors
/// In words: a template that is missing, refuses the conversation, leaves out part of it, or writes earlier turns otherwise once
/// later ones follow (then no part of the text is an answer for certain, unless the template marks what is generated).
pub(super) fn encode_conversation(
    conversation: &Conversation,
    tokenizer: &Tokenizer,
    answers: bool,
) -> Result<(Vec<u32>, Vec<Range<usize>>), String> {
    let Conversation { messages, context } = conversation;
    let template = tokenizer.chat_template().ok_or("the model has no chat template")?;
    let words = |error: still_model::ModelError| error.to_string();
    if messages.is_empty() {
        return Err("a conversation without messages".into());
    }
    let (rendered, unwritten) = template.render_whole(messages, context).map_err(words)?;
    if let Some(what) = unwritten {
        return Err(format!("the chat template leaves out {what}"));
    }
    // The template writes what the tokenizer would add around a document.
    let (ids, offsets) = tokenizer.encode_with_offsets(&rendered.text, false).map_err(words)?;
    if !answers {
        return Ok((ids, Vec::new()));
    }
    let mut spans = Vec::new();
    for span in answer_bytes(conversation, template, rendered)? {
        let start = offsets.partition_point(|&(start, _)| start < span.start);
        let end = offsets.partition_point(|&(start, _)| start < span.end);
        if start < end {
            spans.push(start..end);
        }
    }
    Ok((ids, spans))
}

/// What the template marks as generated or, if it marks nothing, what it writes after the opening of each of the assistant's
/// turns, the end of the turn included.
fn answer_bytes(
    Conversation { messages, context }: &Conversation,
    template: &ChatTemplate,
    rendered: Rendered,
) -> Result<Vec<Range<usize>>, String> {
    if let Some(generated) = rendered.generated {
        return Ok(generated);
    }
    let text = rendered.text;
    let render = |messages: &[Message], prompt| {
        let rendered = template.render_in(messages, context, prompt);
        rendered.map(|rendered| rendered.text).map_err(|error| error.to_string())
    };
    let mut spans = Vec::new();
    for (n, message) in messages.iter().enumerate() {
        if message.role() != "assistant" {
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
