//! Ids decoded one by one as they are generated.

use super::Tokenizer;
use crate::error::Result;

/// Ids before the new ones that are decoded with them: a decoder may strip the space of a first token, or put one
/// between two.
const CONTEXT: usize = 8;
/// Ids in all before old ones are dropped.
const WINDOW: usize = 32;
/// What an incomplete or invalid character decodes to.
const REPLACEMENT: char = '\u{FFFD}';

/// Decodes ids one by one; a text is given out once no later id can change it. All that is given out is what
/// [`Tokenizer::decode`] makes of all ids, without the special ones; the work for an id does not grow with their number.
#[derive(Clone, Debug)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    /// The last ids: some whose text was given out, then those that wait.
    window: Vec<u32>,
    /// How much of the window's text was given out.
    shown: usize,
    /// Special tokens that are given out as text.
    shows: Vec<u32>,
    /// The bytes that end the window, where they are given as one token each.
    bytes: ByteRun,
}

/// Tokens like `<0xE4>` one after another. They are characters if all of them together are valid UTF-8, and nothing but
/// replacement characters, one each, if they are not: so that a run is held back until it ends, or is known to be invalid.
#[derive(Clone, Debug, Default)]
struct ByteRun {
    /// The beginning of a character.
    partial: Vec<u8>,
    /// The run can only become replacement characters.
    invalid: bool,
}

impl TokenStream {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        let (window, shows) = (Vec::new(), Vec::new());
        Self { tokenizer, window, shown: 0, shows, bytes: ByteRun::default() }
    }

    /// The same, which gives out the text of these special tokens too.
    #[must_use]
    pub fn showing(self, special: Vec<u32>) -> Self {
        Self { shows: special, ..self }
    }

    /// Adds an id; returns the text that became certain, if any.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Some(token) = self.tokenizer.inner.id_to_token(id) else { return Ok(None) };
        if self.tokenizer.decoding.special.contains(&id) && !self.shows.contains(&id) {
            return Ok(None);
        }
        let byte = self.tokenizer.decoding.byte_fallback.then(|| byte_of(&token)).flatten();
        if let Some(byte) = byte {
            return self.push_byte(id, byte);
        }
        self.bytes = ByteRun::default();
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, false)?;
        // The last character may be incomplete; those before it cannot be.
        let certain = text.strip_suffix(REPLACEMENT).unwrap_or(&text).len();
        let new = self.advance(&text, certain);
        if self.window.len() >= WINDOW {
            self.forget(text.len().saturating_sub(self.shown))?;
        }
        Ok(new)
    }

    /// What is left at the end, incomplete characters included.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn finish(mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.window, false)?;
        Ok(self.advance(&text, text.len()))
    }

    fn push_byte(&mut self, id: u32, byte: u8) -> Result<Option<String>> {
        if self.bytes.invalid {
            return Ok(Some(REPLACEMENT.to_string()));
        }
        self.window.push(id);
        if self.bytes.push(byte) {
            return Ok(None);
        }
        let text = self.tokenizer.decode(&self.window, false)?;
        let new = self.advance(&text, text.len());
        // The last of them are invalid by themselves: enough of a context for what comes.
        self.drop_before(self.bytes.partial.len() + 1)?;
        Ok(new)
    }

    /// Gives out the text of the window up to `certain`.
    fn advance(&mut self, text: &str, certain: usize) -> Option<String> {
        let new = text.get(self.shown..certain).filter(|new| !new.is_empty())?;
        self.shown = certain;
        Some(new.to_owned())
    }

    /// Drops old ids; the last `held` bytes of the text wait.
    fn forget(&mut self, held: usize) -> Result<()> {
        self.drop_before(CONTEXT)?;
        self.shown = self.shown.saturating_sub(held);
        Ok(())
    }

    /// Keeps the last ids, as given out in full.
    fn drop_before(&mut self, kept: usize) -> Result<()> {
        self.window.drain(..self.window.len().saturating_sub(kept));
        self.shown = self.tokenizer.decode(&self.window, false)?.len();
        Ok(())
    }
}

impl ByteRun {
    /// Adds a byte; whether the run may still be valid.
    fn push(&mut self, byte: u8) -> bool {
        let mut bytes = std::mem::take(&mut self.partial);
        bytes.push(byte);
        match std::str::from_utf8(&bytes) {
            Ok(_) => true,
            Err(error) if error.error_len().is_none() => {
                self.partial = bytes;
                true
            }
            Err(_) => {
                bytes.pop();
                self.partial = bytes;
                self.invalid = true;
                false
            }
        }
    }
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}
