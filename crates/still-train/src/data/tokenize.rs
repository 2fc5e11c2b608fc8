//! Documents to token ids: in parallel, in the file's order.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use still_model::Tokenizer;

use super::chat::encode_conversation;
use super::documents::{Document, Entry, data_error, for_each_batch, parse_line};
use super::kind::{Content, Kind};
use super::pieces::{PIECE, Pieces, Wrong};
#[cfg(feature = "parquet")]
use super::rows;
use super::tokens::TokenWriter;
use crate::error::{Result, TrainError};
use crate::recipe::LossOn;

/// What decides the token ids of a file, besides its text and the tokenizer.
#[derive(Clone, Debug)]
pub(super) struct TextOptions {
    /// The field of a line that holds its text.
    pub text_field: String,
    pub loss_on: LossOn,
    /// Limits; they decide no ids.
    pub max_line_bytes: usize,
    pub max_word_bytes: usize,
}

impl TextOptions {
    /// Whether only the assistant's answers count.
    pub fn counts_answers(&self) -> bool {
        self.loss_on == LossOn::Answers
    }
}

/// Tokenizes a file of text.
pub(super) fn tokenize(
    path: &Path,
    kind: Kind,
    tokenizer: &Tokenizer,
    options: &TextOptions,
    writer: &mut TokenWriter,
) -> Result<()> {
    let answers = options.counts_answers();
    if kind.content == Content::Text {
        let mut file = kind.open(path)?;
        let length = tokenize_text((path, ""), &mut file, tokenizer, options, &mut |ids| {
            writer.extend(ids)
        })?;
        return writer.end_document(&everything(length, answers));
    }
    let encode = |entry: &Entry| -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let place = &entry.place;
        match parse_line(path, entry, &options.text_field, options.max_word_bytes)? {
            Document::Text(text) => {
                let (place, mut ids) = (format!("{place}: "), Vec::new());
                let mut reader = text.as_bytes();
                let length =
                    tokenize_text((path, &place), &mut reader, tokenizer, options, &mut |more| {
                        ids.extend(more);
                        Ok(())
                    })?;
                Ok((ids, everything(length, answers)))
            }
            Document::Conversation(conversation) => {
                encode_conversation(&conversation, tokenizer, answers).map_err(|what| {
                    let hint = "fix the line (without a key that the template does not write), or give the conversation as text";
                    data_error(path, format!("{place}: {what}"), hint)
                })
            }
            Document::Instruction(instruction) => {
                let (ids, answer) = instruction.encode(tokenizer).map_err(|what| {
                    let hint = "name eos_token in tokenizer_config.json, or give the lines as text";
                    data_error(path, format!("{place}: {what}"), hint)
                })?;
                Ok((ids, if answers { vec![answer] } else { Vec::new() }))
            }
        }
    };
    let most = options.max_line_bytes;
    let mut write = |batch: Vec<Entry>| {
        let encoded: Vec<_> = batch.par_iter().map(encode).collect();
        // In order, so that of several bad lines the first is named.
        for document in encoded {
            let (ids, answers) = document?;
            writer.extend(&ids)?;
            writer.end_document(&answers)?;
        }
        Ok(())
    };
    match kind.content {
        #[cfg(feature = "parquet")]
        Content::Rows => rows::for_each_batch(path, &options.text_field, most, &mut write),
        #[cfg(not(feature = "parquet"))]
        Content::Rows => Err(data_error(
            path,
            "this build of still reads no Parquet".into(),
            "build it with the feature `parquet`, or write the rows to a .jsonl file",
        )),
        _ => for_each_batch(path, kind, most, &mut write),
    }
}

/// Where only answers count, a document that is no conversation counts as a whole.
fn everything(length: usize, answers: bool) -> Vec<Range<usize>> {
    if answers { std::iter::once(0..length).collect() } else { Vec::new() }
}

/// Tokenizes one text of any length into `to`; its number of tokens. `place` says where it is, as in "line 3: ".
fn tokenize_text(
    (path, place): (&Path, &str),
    reader: &mut dyn Read,
    tokenizer: &Tokenizer,
    options: &TextOptions,
    to: &mut dyn FnMut(&[u32]) -> Result<()>,
) -> Result<usize> {
    let most = options.max_word_bytes;
    let wrong = |wrong| match wrong {
        Wrong::Io(error) => TrainError::read(path)(error),
        Wrong::NotUtf8(at) => {
            data_error(path, format!("{place}not UTF-8 at byte {at}"), "convert the file to UTF-8")
        }
        Wrong::NoCut(at) => data_error(
            path,
            format!(
                "{place}no two words in more than {most} bytes from byte {at} on (data.max_word_bytes)"
            ),
            "such a text is tokenized whole, in some hundred times its size: divide it into lines, or raise the limit with \
             --set data.max_word_bytes=N",
        ),
    };
    let pieces = Pieces::new(reader, tokenizer, PIECE, most);
    let (mut length, mut after) = (0, None);
    let mut give = |ids: &[u32]| {
        length += ids.len();
        to(ids)
    };
    pieces.for_each(rayon::current_num_threads(), &wrong, &mut |pieces, whole| {
        if whole {
            return give(&tokenizer.encode(pieces[0], true)?);
        }
        if after.is_none() {
            let (before, end) = specials(tokenizer)?;
            give(&before)?;
            after = Some(end);
        }
        let encoded: Vec<_> =
            pieces.par_iter().map(|piece| tokenizer.encode(piece, false)).collect();
        encoded.into_iter().try_for_each(|ids| give(&ids?))
    })?;
    give(&after.unwrap_or_default())?;
    Ok(length)
}

/// What the tokenizer puts before and after a document.
fn specials(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let (inner, whole) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let at = whole.windows(inner.len().max(1)).position(|ids| ids == inner).unwrap_or(0);
    Ok((whole[..at].to_vec(), whole[(at + inner.len()).min(whole.len())..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_without_specials_has_none() {
        let model = still_model::random::random_model(still_model::random::tiny_config(), 0);
        assert_eq!(specials(&model.unwrap().tokenizer).unwrap(), (vec![], vec![]));
    }
}
