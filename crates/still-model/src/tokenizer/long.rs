//! Long texts, cut where cutting changes no token.
//!
//! The library tokenizes a text in one call, which uses one thread and cannot be stopped. Pieces are tokenized by all threads,
//! and between two of them a flag is looked at.

use std::ops::Range;

use rayon::prelude::*;

use super::Tokenizer;
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};

/// Bytes of a piece of [`Tokenizer::encode_long`]: some 20 ms of work.
const PIECE: usize = 1 << 16;
/// Bytes on each side of a cut on which it is tried out.
const AROUND: usize = 256;
/// Places at which a cut is tried before the piece grows.
const TRIES: usize = 16;

impl Tokenizer {
    /// [`Tokenizer::encode`] without special tokens around, by all threads.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses; [`ModelError::Cancelled`] soon after `cancel` is raised.
    pub fn encode_long(&self, text: &str, cancel: &Cancel) -> Result<Vec<u32>> {
        let encode = |piece: Range<usize>| match cancel.is_raised() {
            true => Err(ModelError::Cancelled),
            false => self.encode(&text[piece], false),
        };
        let pieces = self.cut(text, PIECE, &mut 0, true)?;
        let ids: Vec<Vec<u32>> = pieces.into_par_iter().map(encode).collect::<Result<_>>()?;
        Ok(ids.concat())
    }

    /// Cuts a text into pieces of `size` bytes or more, whose ids, one after another, are those of the text. The last is what
    /// no cut was found for yet: unless the text is `at_end`, more of it may follow. `tried` is how far a cut has been looked
    /// for, at first 0.
    ///
    /// A space at which a text is cut may be in no piece.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn cut(
        &self,
        text: &str,
        size: usize,
        tried: &mut usize,
        at_end: bool,
    ) -> Result<Vec<Range<usize>>> {
        let mut pieces = Vec::new();
        let mut start = 0;
        loop {
            let from = *tried + size;
            // All that a cut is looked for in, and what it is tried out on.
            let region = from + size;
            if from >= text.len() || (!at_end && region + AROUND > text.len()) {
                break;
            }
            *tried = from;
            if let Some(cut) = self.find_cut(text, from..region)? {
                pieces.push(start..cut.start);
                (start, *tried) = (cut.end, cut.end);
            }
        }
        pieces.push(start..text.len());
        Ok(pieces)
    }

    /// A place between two words or lines where the ids of the text around are the same with and without a cut. It is empty,
    /// or the space itself: tokenizers that begin every text with a space of their own put one there again.
    ///
    /// Tokenizers look no further than a word or two.
    fn find_cut(&self, text: &str, region: Range<usize>) -> Result<Option<Range<usize>>> {
        let bytes = text.as_bytes();
        let word = |byte: u8| byte.is_ascii_alphabetic() || !byte.is_ascii();
        let end = region.end.min(bytes.len().saturating_sub(1));
        let places = (region.start.max(1)..end).filter(|&at| {
            let (before, after) = (bytes[at - 1], bytes[at + 1]);
            match bytes[at] {
                b' ' => word(before) && word(after),
                b'\n' => word(after),
                _ => false,
            }
        });
        for at in places.take(TRIES) {
            let cuts = match bytes[at] {
                b' ' => [at..at, at..at + 1],
                _ => [at + 1..at + 1, at..at + 1],
            };
            let boundary = |at: &usize| text.is_char_boundary(*at);
            let first = (at.saturating_sub(AROUND)..=at).find(boundary).unwrap_or(at);
            let last = (at..=(at + 1 + AROUND).min(text.len())).rev().find(boundary).unwrap_or(at);
            let together = self.encode(&text[first..last], false)?;
            for cut in cuts {
                let mut apart = self.encode(&text[first..cut.start], false)?;
                apart.extend(self.encode(&text[cut.end..last], false)?);
                if together == apart {
                    return Ok(Some(cut));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{random_model, tiny_config};

    #[test]
    fn a_long_text_has_the_ids_of_one_call() {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        let line = "<|im_start|>user\nDer Öltanker läuft aus, und 12 Möwen kehren heim. \n\n";
        let text = line.repeat(5_000);
        let pieces = tokenizer.cut(&text, PIECE, &mut 0, true).unwrap();
        assert!(pieces.len() > 4, "{}", pieces.len());
        let ids = tokenizer.encode_long(&text, &Cancel::default()).unwrap();
        assert_eq!(ids, tokenizer.encode(&text, false).unwrap());
        for text in ["", "short", &"x".repeat(3 * PIECE)] {
            let ids = tokenizer.encode_long(text, &Cancel::default()).unwrap();
            assert_eq!(ids, tokenizer.encode(text, false).unwrap());
        }
    }

    #[test]
    fn a_flag_that_is_raised_ends_it() {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        let cancel = Cancel::default();
        cancel.raise();
        let ended = tokenizer.encode_long("some words", &cancel);
        assert!(matches!(ended, Err(ModelError::Cancelled)), "{ended:?}");
    }
}
