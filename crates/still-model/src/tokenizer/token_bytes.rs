//! The bytes that each token stands for.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::stream::byte_of;
use super::{Tokenizer, has_byte_fallback};

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// A letter for each byte, as GPT-2 has it.
    ByteLevel,
    /// `▁` for a space, and tokens such as `<0x0A>` for bytes, as SentencePiece has it.
    SentencePiece,
}

impl Tokenizer {
    /// The bytes of every token by its id, nothing of an id that is no token; `None` of a vocabulary that spells neither as
    /// GPT-2's nor as SentencePiece's does.
    pub fn token_bytes(&self) -> Option<Vec<Vec<u8>>> {
        let decoder = serde_json::to_value(self.inner.get_decoder()).ok()?;
        let spelling = spelling_of(&decoder)?;
        let letters: HashMap<char, u8> = match spelling {
            Spelling::ByteLevel => letters(),
            Spelling::SentencePiece => HashMap::new(),
        };
        let mut bytes = vec![Vec::new(); self.vocab_size()];
        for (token, id) in self.inner.get_vocab(false) {
            bytes[id as usize] = match spelling {
                // A letter that stands for no byte stands for itself.
                Spelling::ByteLevel => token
                    .chars()
                    .flat_map(|c| match letters.get(&c) {
                        Some(&byte) => vec![byte],
                        None => c.to_string().into_bytes(),
                    })
                    .collect(),
                Spelling::SentencePiece => match byte_of(&token) {
                    Some(byte) => vec![byte],
                    None => token.replace('\u{2581}', " ").into_bytes(),
                },
            };
        }
        // These are written as they are.
        for (id, token) in self.inner.get_added_tokens_decoder() {
            bytes[id as usize] = token.content.into_bytes();
        }
        Some(bytes)
    }
}

fn spelling_of(decoder: &Value) -> Option<Spelling> {
    let is = |decoder: &Value, name: &str| decoder["type"].as_str() == Some(name);
    let parts = match decoder["decoders"].as_array() {
        Some(parts) => parts.as_slice(),
        None => std::slice::from_ref(decoder),
    };
    if parts.iter().any(|part| is(part, "ByteLevel")) {
        Some(Spelling::ByteLevel)
    } else if parts.iter().any(|part| is(part, "Metaspace")) || has_byte_fallback(decoder) {
        Some(Spelling::SentencePiece)
    } else {
        None
    }
}

/// The byte of each letter, found by writing every byte in the tokenizer library's letters: those of visible characters stand for
/// themselves, the others follow from 256 on.
fn letters() -> HashMap<char, u8> {
    let alphabet = ByteLevel::alphabet();
    let mut next = 256;
    (0..=u8::MAX)
        .map(|byte| {
            let own = char::from(byte);
            let visible = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let letter = match visible {
                true => own,
                false => {
                    next += 1;
                    char::from_u32(next - 1).unwrap_or(own)
                }
            };
            debug_assert!(alphabet.contains(&letter));
            (letter, byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{random_model, tiny_config};

    #[test]
    fn tokens_of_a_text_have_the_bytes_of_the_text() {
        let tokenizer = random_model(tiny_config(), 1).unwrap().tokenizer;
        let bytes = tokenizer.token_bytes().unwrap();
        let text = "é\u{301} 你好\n\t\u{7f}\u{0} naïve ¡ÿ<|im_end|>";
        let ids = tokenizer.encode(text, false).unwrap();
        let joined: Vec<u8> = ids.iter().flat_map(|&id| bytes[id as usize].clone()).collect();
        assert_eq!(joined, text.as_bytes());
        let mut of_bytes: Vec<&Vec<u8>> = bytes[..256].iter().collect();
        of_bytes.sort();
        assert_eq!(
            of_bytes,
            (0..=255).map(|byte| vec![byte]).collect::<Vec<_>>().iter().collect::<Vec<_>>()
        );
    }

    #[test]
    fn spellings_are_known_by_their_decoders() {
        let of = |json: &str| spelling_of(&serde_json::from_str(json).unwrap());
        assert_eq!(of(r#"{"type":"ByteLevel"}"#), Some(Spelling::ByteLevel));
        let sentence_piece =
            r#"{"type":"Sequence","decoders":[{"type":"Replace"},{"type":"ByteFallback"}]}"#;
        assert_eq!(of(sentence_piece), Some(Spelling::SentencePiece));
        assert_eq!(of(r#"{"type":"WordPiece"}"#), None);
    }
}
