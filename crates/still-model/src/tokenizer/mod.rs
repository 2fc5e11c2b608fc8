//! Text to token ids and back.
//!
//! | file | content |
//! |---|---|
//! | `hugging_face` | `tokenizer.json` and `tokenizer_config.json` |
//! | `gguf` | tokenizers that a GGUF file describes |
//! | `check` | what is looked at before the library gets a file |
//! | `guard` | panics of the library, caught |
//! | `long` | long texts, by all threads, which a flag can stop |
//! | `stream` | ids decoded one by one |
//! | `token_bytes` | the bytes that each token stands for |

mod check;
mod gguf;
mod guard;
mod hugging_face;
mod long;
mod stream;
mod token_bytes;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::chat::ChatTemplate;
use crate::error::{ModelError, Result};

pub(crate) use gguf::end_of_generation;
pub use guard::panics_are_expected;
pub use stream::TokenStream;

/// A model's tokenizer and chat template.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    chat_template: Option<ChatTemplate>,
    /// `tokenizer_config.json`, kept to be saved next to a student.
    config: Value,
    /// The file it was read from, for errors.
    file: Option<Arc<Path>>,
    decoding: Arc<Decoding>,
}

/// What decoding by hand has to know.
#[derive(Debug)]
struct Decoding {
    /// Ids that decoding may skip.
    special: HashSet<u32>,
    /// Tokens like `<0x0A>` stand for bytes.
    byte_fallback: bool,
    /// One more than the largest id.
    vocab_size: usize,
}

/// First byte and the one after the last.
pub type Span = (usize, usize);

impl Tokenizer {
    /// From a tokenizer made in memory.
    pub fn new(inner: tokenizers::Tokenizer, chat_template: Option<ChatTemplate>) -> Self {
        let config = match &chat_template {
            Some(template) => json!({ "chat_template": template.source() }),
            None => json!({}),
        };
        Self::assemble(inner, chat_template, config, None)
    }

    fn assemble(
        inner: tokenizers::Tokenizer,
        chat_template: Option<ChatTemplate>,
        config: Value,
        file: Option<&Path>,
    ) -> Self {
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
        // A vocabulary may have holes.
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let byte_fallback = has_byte_fallback(&decoder);
        let decoding = Decoding { special, byte_fallback, vocab_size };
        Self {
            inner: Arc::new(inner),
            chat_template,
            config,
            file: file.map(Into::into),
            decoding: Arc::new(decoding),
        }
    }

    /// What [`Tokenizer::from_json`] reads: the contents of `tokenizer.json` and of `tokenizer_config.json`.
    ///
    /// # Errors
    /// Whatever the tokenizer library refuses.
    pub fn to_json(&self) -> Result<(String, &Value)> {
        let tokenizer = self.library(|inner| inner.to_string(false))?;
        Ok((tokenizer, &self.config))
    }

    /// Token ids of a text; `add_special` adds what the tokenizer puts around a document.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.library(|inner| inner.encode_fast(text, add_special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`Tokenizer::encode`] with the bytes of the text that each token stands for.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode_with_offsets(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<(Vec<u32>, Vec<Span>)> {
        let encoding = self.library(|inner| inner.encode(text, add_special))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.library(|inner| inner.decode(ids, skip_special))
    }

    /// One token as text, for display.
    pub fn token_text(&self, id: u32) -> String {
        self.decode(&[id], false).unwrap_or_else(|_| format!("<{id}>"))
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Ids of the vocabulary, added tokens included: one more than the largest.
    pub fn vocab_size(&self) -> usize {
        self.decoding.vocab_size
    }

    /// The id of a token given literally.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a token is one that decoding may skip, such as `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.decoding.special.contains(&id)
    }

    /// The ids of tokens that stand for this text and nothing else: of `<|im_end|>`, which decoding skips, or of `<0x0A>`
    /// for a line's end.
    pub(crate) fn ids_of_text(&self, text: &str) -> Vec<u32> {
        let byte = match text.as_bytes() {
            [byte] => self.token_id(&format!("<0x{byte:02X}>")),
            _ => None,
        };
        let mut ids: Vec<u32> = self.token_id(text).into_iter().chain(byte).collect();
        // A byte-level vocabulary spells "é" otherwise, and has another token that looks like it.
        ids.retain(|id| self.decode(&[*id], false).is_ok_and(|of| of == text));
        ids
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// An unwritable directory.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let (tokenizer, config) = self.to_json()?;
        let path = dir.join("tokenizer.json");
        std::fs::write(&path, tokenizer).map_err(ModelError::write(&path))?;
        let path = dir.join("tokenizer_config.json");
        std::fs::write(&path, format!("{config:#}\n")).map_err(ModelError::write(&path))
    }

    /// An incremental decoder of generated ids.
    pub fn stream(&self) -> TokenStream {
        TokenStream::new(self.clone())
    }

    /// Calls the tokenizer library; what it refuses, and what it panics over, is an error that names the file.
    fn library<T>(
        &self,
        call: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<T>,
    ) -> Result<T> {
        let result = guard::catch(|| call(&self.inner))
            .and_then(|result| result.map_err(|error| error.to_string()));
        result.map_err(|reason| match &self.file {
            Some(file) => refused(file, &reason),
            None => ModelError::Tokenizer(reason),
        })
    }
}

/// The library's word about a tokenizer from a file.
fn refused(file: &Path, reason: &str) -> ModelError {
    ModelError::Corrupt {
        path: file.to_path_buf(),
        reason: format!("the tokenizer fails: {reason}"),
        hint: "the tokenizer is damaged or made for another library: fetch or export it again"
            .into(),
    }
}

fn has_byte_fallback(decoder: &Value) -> bool {
    match decoder["type"].as_str() {
        Some("ByteFallback") => true,
        Some("Sequence") => {
            decoder["decoders"].as_array().is_some_and(|all| all.iter().any(has_byte_fallback))
        }
        _ => false,
    }
}
