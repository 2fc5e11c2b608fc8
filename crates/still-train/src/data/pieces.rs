//! A text of any length in pieces that are tokenized one by one as they are together.
//!
//! A tokenizer's working memory is many times its text, so that a long text is cut where cutting changes nothing, and no more
//! of it is held than the pieces at work.

use std::io::Read;

use still_model::Tokenizer;

use crate::error::{Result, TrainError};

/// Long texts are tokenized in pieces of about so many bytes.
pub(super) const PIECE: usize = 1 << 20;
/// Bytes beyond the last place of a cut, on which it is tried out.
const LOOKAHEAD: usize = 512;
/// Bytes that are read at a time.
const READ: usize = 1 << 18;

/// What is wrong with a text.
#[derive(Debug)]
pub(super) enum Wrong {
    /// It cannot be read.
    Io(std::io::Error),
    /// It is not UTF-8 at this byte.
    NotUtf8(u64),
    /// No place to cut was found after this byte.
    NoCut(u64),
}

/// A text that is being read.
pub(super) struct Pieces<'a> {
    reader: &'a mut dyn Read,
    tokenizer: &'a Tokenizer,
    /// Bytes of a piece.
    size: usize,
    /// Most bytes of a piece for which no cut is found; at least `size`.
    most: usize,
    text: String,
    /// How far in it a cut has been looked for.
    tried: usize,
    /// Bytes of a character that is not whole yet.
    partial: Vec<u8>,
    /// Bytes given so far.
    given: u64,
    at_end: bool,
}

impl<'a> Pieces<'a> {
    pub fn new(
        reader: &'a mut dyn Read,
        tokenizer: &'a Tokenizer,
        size: usize,
        most: usize,
    ) -> Self {
        Self {
            reader,
            tokenizer,
            size,
            most,
            text: String::new(),
            tried: 0,
            partial: Vec::new(),
            given: 0,
            at_end: false,
        }
    }

    /// Gives all pieces to `each`, some at a time, and whether they are the whole text: it is one piece then.
    ///
    /// # Errors
    /// Of the text, as `wrong` tells it; of `each`.
    pub fn for_each(
        mut self,
        at_a_time: usize,
        wrong: &dyn Fn(Wrong) -> TrainError,
        each: &mut dyn FnMut(&[&str], bool) -> Result<()>,
    ) -> Result<()> {
        let mut first = true;
        loop {
            let wanted = self.tried + at_a_time.max(1) * self.size + self.size + LOOKAHEAD;
            while self.text.len() < wanted && !self.at_end {
                self.fill().map_err(wrong)?;
            }
            let mut ranges =
                self.tokenizer.cut(&self.text, self.size, &mut self.tried, self.at_end)?;
            let rest = ranges.pop().unwrap_or(0..0);
            let most = self.most.max(self.size);
            if self.tried.saturating_sub(rest.start) > most || (self.at_end && rest.len() > most) {
                return Err(wrong(Wrong::NoCut(self.given + rest.start as u64)));
            }
            let whole = first && ranges.is_empty() && self.at_end;
            if self.at_end {
                ranges.push(rest.clone());
            }
            if !ranges.is_empty() {
                let pieces: Vec<&str> =
                    ranges.iter().map(|range| &self.text[range.clone()]).collect();
                each(&pieces, whole)?;
                first = false;
            }
            if self.at_end {
                return Ok(());
            }
            self.text.drain(..rest.start);
            self.tried = self.tried.saturating_sub(rest.start);
            self.given += rest.start as u64;
        }
    }

    fn fill(&mut self) -> std::result::Result<(), Wrong> {
        let before = self.partial.len();
        let read = (&mut *self.reader).take(READ as u64).read_to_end(&mut self.partial);
        read.map_err(Wrong::Io)?;
        self.at_end = self.partial.len() == before;
        let at = self.given + self.text.len() as u64;
        let valid = match str::from_utf8(&self.partial) {
            Ok(text) => text.len(),
            // The rest of a character may come yet.
            Err(error) if error.error_len().is_none() && !self.at_end => error.valid_up_to(),
            Err(error) => return Err(Wrong::NotUtf8(at + error.valid_up_to() as u64)),
        };
        let rest = self.partial.split_off(valid);
        let valid = std::mem::replace(&mut self.partial, rest);
        self.text += &String::from_utf8(valid).map_err(|_| Wrong::NotUtf8(at))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use still_model::random::{random_model, tiny_config};

    use super::*;
    use crate::data::documents::data_error;

    fn told(wrong: Wrong) -> TrainError {
        data_error(Path::new("text"), format!("{wrong:?}"), "")
    }

    /// All pieces, and whether they were the whole.
    fn pieces(
        text: &str,
        size: usize,
        most: usize,
        tokenizer: &Tokenizer,
    ) -> Result<(Vec<String>, bool)> {
        let (mut all, mut is_whole) = (Vec::new(), false);
        let mut reader = text.as_bytes();
        Pieces::new(&mut reader, tokenizer, size, most).for_each(
            2,
            &told,
            &mut |pieces, whole| {
                all.extend(pieces.iter().map(|&piece| piece.to_owned()));
                is_whole = whole;
                Ok(())
            },
        )?;
        Ok((all, is_whole))
    }

    #[test]
    fn pieces_are_the_text_cut_between_words() {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        let text = "Der Öltanker läuft aus und kehrt nicht wieder heim. ".repeat(40);
        let (cut, whole) = pieces(&text, 300, 600, &tokenizer).unwrap();
        assert!(cut.len() > 4 && !whole, "{}", cut.len());
        assert_eq!(cut.concat(), text);
        assert!(cut[1..].iter().all(|piece| piece.starts_with(' ')));
        let (cut, whole) = pieces(&text, 1 << 20, 1 << 20, &tokenizer).unwrap();
        assert_eq!((cut, whole), (vec![text.clone()], true));
        assert_eq!(pieces("", 300, 600, &tokenizer).unwrap(), (vec![String::new()], true));
        // Paragraphs apart by empty lines.
        let lines = "吾輩は猫である。\n\n".repeat(100);
        let (cut, _) = pieces(&lines, 300, 700, &tokenizer).unwrap();
        assert!(cut.len() > 4 && cut.concat() == lines);
    }

    #[test]
    fn a_word_without_end_is_refused_where_it_begins() {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        let word = "x".repeat(1000);
        assert_eq!(pieces(&word, 300, 1000, &tokenizer).unwrap(), (vec![word.clone()], true));
        let error = pieces(&word, 300, 999, &tokenizer).unwrap_err();
        assert!(error.to_string().contains("NoCut(0)"), "{error}");
        let text = "one two three ".repeat(40) + &"x".repeat(100_000);
        let error = pieces(&text, 200, 1000, &tokenizer).unwrap_err().to_string();
        let at: usize = error.split(['(', ')']).nth(1).unwrap().parse().unwrap();
        assert!((300..560).contains(&at), "{error}");
    }

    #[test]
    fn bytes_that_are_no_text_are_told_by_their_place() {
        let tokenizer = random_model(tiny_config(), 0).unwrap().tokenizer;
        let run = |bytes: &[u8]| {
            let mut reader = bytes;
            let pieces = Pieces::new(&mut reader, &tokenizer, 300, 1000);
            pieces.for_each(1, &told, &mut |_, _| Ok(())).unwrap_err().to_string()
        };
        let long = "word ".repeat(200_000).into_bytes();
        assert!(run(&[&long, b"\xff".as_slice(), &long].concat()).contains("NotUtf8(1000000)"));
        assert!(run(b"caf\xe9").contains("NotUtf8(3)"));
        assert!(run(b"caf\xc3").contains("NotUtf8(3)"), "a character cut short");
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
        let (cut, _) = pieces(text, 2_000, 10_000, &tokenizer).unwrap();
        assert!(cut.len() > 100, "{}", cut.len());
        let ids: Vec<u32> =
            cut.iter().flat_map(|piece| tokenizer.encode(piece, false).unwrap()).collect();
        assert_eq!(ids, tokenizer.encode(text, false).unwrap());
    }
}
