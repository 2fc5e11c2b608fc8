//! Documents to token ids: in parallel, in the file's order.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use still_model::Tokenizer;

use super::chat::encode_conversation;
use super::documents::{Document, Kind, data_error, for_each_batch, parse_line, read_text};
use super::tokens::TokenWriter;
use crate::error::Result;
use crate::recipe::LossOn;

/// Long texts are tokenized in pieces of about so many bytes.
const PIECE: usize = 1 << 20;
/// Bytes on each side of a cut on which it is tried out.
const AROUND: usize = 256;
/// Places at which a cut is tried before the piece grows.
const TRIES: usize = 16;

/// What decides the token ids of a file, besides its text and the tokenizer.
#[derive(Clone, Debug)]
pub(super) struct TextOptions {
    /// The field of a line that holds its text.
    pub text_field: String,
    pub loss_on: LossOn,
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
    if kind == Kind::Text {
        let length = tokenize_text(&read_text(path)?, tokenizer, writer)?;
        return writer.end_document(&everything(length, answers));
    }
    let encode = |(number, line): &(usize, String)| -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        match parse_line(path, *number, line, &options.text_field)? {
            Document::Text(text) => {
                let ids = tokenizer.encode(&text, true)?;
                let length = ids.len();
                Ok((ids, everything(length, answers)))
            }
            Document::Conversation(messages) => encode_conversation(&messages, tokenizer, answers)
                .map_err(|what| {
                    let hint = "mend the line, or give the conversation as text";
                    data_error(path, format!("line {number}: {what}"), hint)
                }),
        }
    };
    for_each_batch(path, kind, &mut |batch| {
        let encoded: Vec<_> = batch.par_iter().map(encode).collect();
        // In order, so that of several bad lines the first is named.
        for document in encoded {
            let (ids, answers) = document?;
            writer.extend(&ids)?;
            writer.end_document(&answers)?;
        }
        Ok(())
    })
}

/// Where only answers count, a document that is no conversation counts as a whole.
fn everything(length: usize, answers: bool) -> Vec<Range<usize>> {
    if answers { std::iter::once(0..length).collect() } else { Vec::new() }
}

/// Tokenizes one text of any length; its number of tokens.
///
/// A tokenizer's working memory is many times its text, so that a long text is cut where cutting changes nothing.
fn tokenize_text(text: &str, tokenizer: &Tokenizer, writer: &mut TokenWriter) -> Result<usize> {
    let pieces = pieces(text, PIECE, tokenizer)?;
    if let [whole] = pieces[..] {
        let ids = tokenizer.encode(whole, true)?;
        writer.extend(&ids)?;
        return Ok(ids.len());
    }
    let (before, after) = specials(tokenizer)?;
    writer.extend(&before)?;
    let mut length = before.len() + after.len();
    for pieces in pieces.chunks(rayon::current_num_threads().max(1)) {
        let encoded: Vec<_> =
            pieces.par_iter().map(|piece| tokenizer.encode(piece, false)).collect();
        for ids in encoded {
            let ids = ids?;
            length += ids.len();
            writer.extend(&ids)?;
        }
    }
    writer.extend(&after)?;
    Ok(length)
}

/// What the tokenizer puts before and after a document.
fn specials(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let (inner, whole) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let at = whole.windows(inner.len().max(1)).position(|ids| ids == inner).unwrap_or(0);
    Ok((whole[..at].to_vec(), whole[(at + inner.len()).min(whole.len())..].to_vec()))
}

/// A text in pieces of about `size` bytes that are tokenized one by one as they are together.
fn pieces<'a>(text: &'a str, size: usize, tokenizer: &Tokenizer) -> Result<Vec<&'a str>> {
    let mut pieces = Vec::new();
    let (mut start, mut tried) = (0, 0);
    while text.len() - tried > size {
        tried += size;
        if let Some(cut) = find_cut(text, tried, tokenizer)? {
            pieces.push(&text[start..cut]);
            (start, tried) = (cut, cut);
        }
    }
    pieces.push(&text[start..]);
    Ok(pieces)
}

/// A place between two words or lines, at most `PIECE` bytes after `from`, where the ids of the text around are the same
/// with and without a cut. Tokenizers look no further than a word or two; one that marks the beginning of a text
/// passes no such test.
fn find_cut(text: &str, from: usize, tokenizer: &Tokenizer) -> Result<Option<usize>> {
    let bytes = text.as_bytes();
    let word = |byte: u8| byte.is_ascii_alphabetic() || !byte.is_ascii();
    let places = (from..bytes.len().min(from + PIECE).saturating_sub(1)).filter_map(|at| {
        let (before, after) = (bytes[at - 1], bytes[at + 1]);
        match bytes[at] {
            b' ' if word(before) && word(after) => Some(at),
            b'\n' if !before.is_ascii_whitespace() && word(after) => Some(at + 1),
            _ => None,
        }
    });
    for cut in places.take(TRIES) {
        let boundary = |at: &usize| text.is_char_boundary(*at);
        let first = (cut.saturating_sub(AROUND)..=cut).find(boundary).unwrap_or(cut);
        let last = (cut..=(cut + AROUND).min(text.len())).rev().find(boundary).unwrap_or(cut);
        let mut apart = tokenizer.encode(&text[first..cut], false)?;
        apart.extend(tokenizer.encode(&text[cut..last], false)?);
        if tokenizer.encode(&text[first..last], false)? == apart {
            return Ok(Some(cut));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use still_model::random::{random_model, tiny_config};

    use super::*;

    #[test]
    fn pieces_are_the_text_cut_between_words() {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        let text = "Der Öltanker läuft aus und kehrt nicht wieder heim. ".repeat(40);
        let cut = pieces(&text, 300, &tokenizer).unwrap();
        assert!(cut.len() > 4, "{}", cut.len());
        assert_eq!(cut.concat(), text);
        assert!(cut[1..].iter().all(|piece| piece.starts_with(' ')));
        assert_eq!(pieces(&text, 1 << 20, &tokenizer).unwrap(), [text.as_str()]);
        // No two words, no cut.
        let word = "x".repeat(1000);
        assert_eq!(pieces(&word, 300, &tokenizer).unwrap(), [word.as_str()]);
    }

    /// A real tokenizer and real books: some hundred cuts, and the ids of the whole.
    #[test]
    fn pieces_give_the_ids_of_the_whole() {
        let model = still_model::fetch::demo_model(&mut |line| eprintln!("{line}")).unwrap();
        let mut file = std::fs::File::open(&model).unwrap();
        let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
        let tokenizer = Tokenizer::from_gguf(&model, &content).unwrap();
        let book = Path::new(env!("CARGO_MANIFEST_DIR")).join("../still-cli/demo/train.txt");
        let text = std::fs::read_to_string(book).unwrap();
        let text = &text[..text.len().min(300_000)];
        let cut = pieces(text, 2_000, &tokenizer).unwrap();
        assert!(cut.len() > 100, "{}", cut.len());
        let ids: Vec<u32> =
            cut.iter().flat_map(|piece| tokenizer.encode(piece, false).unwrap()).collect();
        assert_eq!(ids, tokenizer.encode(text, false).unwrap());
        assert_eq!(specials(&tokenizer).unwrap(), (vec![], vec![]));
    }
}
