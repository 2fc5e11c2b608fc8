//! The byte order mark that some programs write before UTF-8.

use std::io::{Cursor, Read};

const MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// A text's bytes without the mark at their beginning, which is no part of the text: a tokenizer would give it ids, and no JSON
/// begins with it.
#[derive(Debug)]
pub(super) struct Unmarked<R> {
    inner: R,
    begun: bool,
    /// The first bytes, where they are no mark.
    start: Cursor<Vec<u8>>,
}

impl<R: Read> Unmarked<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, begun: false, start: Cursor::default() }
    }
}

impl<R: Read> Read for Unmarked<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if !self.begun {
            let mut start = Vec::with_capacity(MARK.len());
            (&mut self.inner).take(MARK.len() as u64).read_to_end(&mut start)?;
            self.begun = true;
            if start != MARK {
                self.start = Cursor::new(start);
            }
        }
        match self.start.read(into)? {
            0 => self.inner.read(into),
            read => Ok(read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_at_the_beginning_is_no_text() {
        for (bytes, text) in [
            ("\u{feff}abc", "abc"),
            ("abc", "abc"),
            ("a\u{feff}", "a\u{feff}"),
            ("\u{feff}\u{feff}", "\u{feff}"),
            ("ab", "ab"),
            ("", ""),
            ("\u{feff}", ""),
        ] {
            let mut read = String::new();
            Unmarked::new(bytes.as_bytes()).read_to_string(&mut read).unwrap();
            assert_eq!(read, text, "{bytes:?}");
        }
    }
}
