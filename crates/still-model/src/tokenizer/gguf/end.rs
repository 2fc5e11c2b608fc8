//! Tokens that end a generation.

use candle_core::quantized::gguf_file::{Content, Value};

/// The tokens that end a turn or a text, by what they are called: converters leave most of them out of the metadata. The
/// list is llama.cpp's.
const TEXTS: [&str; 33] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    // What completes code is over where another file begins.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];
/// Where all of a row's first tokens are, its last ends no generation.
const EXCEPTIONS: [(&[&str], &str); 3] = [
    (&["<|return|>", "<|call|>"], "<|end|>"),
    (&["<|calls|>", "<|flush|>"], "<|end|>"),
    (&["<|tool_response>"], "</s>"),
];

/// The ids that end a generation: those that the file names, and those of known tokens.
pub(crate) fn end_of_generation(content: &Content) -> Vec<u32> {
    let named = ["eos", "eot", "eom"].into_iter().filter_map(|which| {
        as_id(content.metadata.get(&format!("tokenizer.ggml.{which}_token_id"))?)
    });
    let mut ids: Vec<u32> = named.collect();
    if let Some(Value::Array(entries)) = content.metadata.get("tokenizer.ggml.tokens") {
        let text = |entry: &Value| entry.to_string().cloned().unwrap_or_default();
        ids.extend(tokens(&entries.iter().map(text).collect::<Vec<_>>()));
    }
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}

/// The ids of known tokens.
pub(super) fn tokens(tokens: &[String]) -> Vec<u32> {
    let known = |text: &str| TEXTS.contains(&text);
    let found: Vec<(u32, &str)> = tokens
        .iter()
        .enumerate()
        .filter(|(_, token)| known(token))
        .map(|(id, token)| (id as u32, token.as_str()))
        .collect();
    let has = |text: &&str| found.iter().any(|(_, token)| token == text);
    let excepted = |token: &str| {
        EXCEPTIONS.iter().any(|(beside, last)| *last == token && beside.iter().all(has))
    };
    found.iter().filter(|(_, token)| !excepted(token)).map(|(id, _)| *id).collect()
}

/// A token id; converters write several types of numbers.
pub(super) fn as_id(value: &Value) -> Option<u32> {
    match value {
        Value::U8(id) => Some(u32::from(*id)),
        Value::U16(id) => Some(u32::from(*id)),
        Value::U32(id) => Some(*id),
        Value::U64(id) => u32::try_from(*id).ok(),
        Value::I8(id) => u32::try_from(*id).ok(),
        Value::I16(id) => u32::try_from(*id).ok(),
        Value::I32(id) => u32::try_from(*id).ok(),
        Value::I64(id) => u32::try_from(*id).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(texts: &[&str]) -> Vec<u32> {
        tokens(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn known_tokens_end_a_generation() {
        assert_eq!(ends(&["a", "<|im_end|>", "<|im_start|>", "<|eot_id|>"]), [1, 3]);
        assert_eq!(ends(&["</s>", "<|end|>", "<|call|>"]), [0, 1, 2]);
    }

    #[test]
    fn what_ends_a_part_of_a_message_does_not_end_it() {
        assert_eq!(ends(&["<|end|>", "<|return|>", "<|call|>"]), [1, 2]);
        assert_eq!(ends(&["</s>", "<|tool_response>"]), [1]);
    }
}
