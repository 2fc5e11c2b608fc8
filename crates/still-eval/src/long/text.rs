//! A running text as hay: its sentences, and its beginning by words.

use std::path::Path;

use unicode_segmentation::UnicodeSegmentation;

use crate::error::{EvalError, Result};

/// A text in sentences (Unicode's default boundaries), white space made single spaces.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub sentences: Vec<String>,
}

impl Text {
    pub fn read(path: &Path) -> Result<Self> {
        let text = Self::new(&read(path)?);
        if text.sentences.is_empty() {
            return Err(malformed(path, 1, "there is no text in it"));
        }
        Ok(text)
    }

    pub fn new(text: &str) -> Self {
        let single_spaces = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let sentences = single_spaces.split_sentence_bounds().map(|s| s.trim_end().to_owned());
        Self { sentences: sentences.collect() }
    }

    /// The first `words` words in sentences, the last of them cut short; the text begins again where it ends.
    pub fn first_words(&self, words: usize) -> Vec<&str> {
        let mut taken = Vec::new();
        let mut left = words;
        for sentence in self.sentences.iter().cycle() {
            if left == 0 {
                break;
            }
            let spaces = || sentence.match_indices(' ');
            match spaces().nth(left - 1) {
                Some((end, _)) => {
                    taken.push(&sentence[..end]);
                    break;
                }
                None => taken.push(sentence.as_str()),
            }
            left = left.saturating_sub(spaces().count() + 1);
        }
        taken
    }
}

/// The text of a file.
pub(super) fn read(path: &Path) -> Result<String> {
    let bytes = still_model::files::read(path).map_err(|source| EvalError::Io {
        action: "cannot read",
        path: path.to_path_buf(),
        source,
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
        malformed(path, line, "not UTF-8")
    })
}

/// What is wrong with a line of a file.
pub(super) fn malformed(path: &Path, line: usize, reason: impl Into<String>) -> EvalError {
    EvalError::Data { path: path.to_path_buf(), line, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_and_words_are_cut_and_go_round() {
        let text = Text::new("  One two.\n\nThree four   five! ");
        assert_eq!(text.sentences, ["One two.", "Three four five!"]);
        assert_eq!(text.first_words(1), ["One"]);
        assert_eq!(text.first_words(2), ["One two."]);
        assert_eq!(text.first_words(4), ["One two.", "Three four"]);
        assert_eq!(text.first_words(6), ["One two.", "Three four five!", "One"]);
    }
}
