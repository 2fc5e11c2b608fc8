//! Conversations that keep their attention state, between turns and in a file.
//!
//! | file | content |
//! |---|---|
//! | `turn` | one question and its answer |
//! | `document` | a document that is read before the question about it |
//! | `file` | a session in a file |
//! | `sequence` | a sequence and its state, as the bytes of such a file |

mod document;
mod file;
mod sequence;
mod turn;

use std::path::Path;
use std::sync::OnceLock;

use still_attention::RowDtype;

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::chat::Message;
use crate::error::{ModelError, Result};
use crate::executor::Wanted;
use crate::model::Model;

pub use self::document::message_about;
pub use self::sequence::SavedSequence;
pub use self::turn::Reply;

/// A conversation with a model: its messages, perhaps a document that was read but not asked about yet, and the state after them.
///
/// A turn continues the state as long as the rendered conversation extends what the state has read. It works on a copy, so a turn
/// that fails or is cancelled leaves the conversation as it was.
#[derive(Debug)]
pub struct ChatSession {
    model: Model,
    rows: RowDtype,
    messages: Vec<Message>,
    document: Option<String>,
    cache: Cache,
    /// Tokens that the state has read.
    tokens: Vec<u32>,
    generated: Option<Generated>,
    /// [`file::identity`] of the model, once it is known.
    identity: OnceLock<String>,
}

/// A conversation that ends with generated tokens.
///
/// Their text may encode to other tokens. The next turn continues the generated ones.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Generated {
    /// Tokens of prompt and answer.
    text: String,
    /// Text of both.
    tokens: Vec<u32>,
}

impl ChatSession {
    /// An empty conversation, perhaps with a system message.
    ///
    /// # Errors
    /// A model without a chat template.
    pub fn new(model: Model, rows: RowDtype, system: Option<&str>) -> Result<Self> {
        check_template(&model)?;
        let cache = model.new_cache(1, rows)?;
        let messages = system.map(|text| Message::new("system", text)).into_iter().collect();
        Ok(Self {
            model,
            rows,
            messages,
            document: None,
            cache,
            tokens: Vec::new(),
            generated: None,
            identity: OnceLock::new(),
        })
    }

    /// A session that was [saved](Self::save) for this model, on this device or another. Nothing is read again.
    ///
    /// # Errors
    /// A model without a chat template; a file that is damaged, or of another model or format.
    pub fn open(model: Model, path: &Path) -> Result<Self> {
        check_template(&model)?;
        let identity = file::identity(&model)?;
        let (saved, tensors) = file::read(path, &identity)?;
        let empty = model.new_cache(1, saved.rows)?;
        let cache = sequence::restored(empty, path, &saved.tokens, tensors)?;
        let file::Saved { rows, messages, document, tokens, generated } = saved;
        let identity = OnceLock::from(identity);
        Ok(Self { model, rows, messages, document, cache, tokens, generated, identity })
    }

    /// Replaces this conversation by a session that was [saved](Self::save) for this model. Its rows keep their dtype.
    ///
    /// # Errors
    /// A file that is damaged, or of another model or format. The conversation is unchanged then.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let (saved, tensors) = file::read(path, self.identity()?)?;
        let empty = self.model.new_cache(1, saved.rows)?;
        let cache = sequence::restored(empty, path, &saved.tokens, tensors)?;
        let file::Saved { rows, messages, document, tokens, generated } = saved;
        (self.rows, self.messages, self.document) = (rows, messages, document);
        (self.cache, self.tokens, self.generated) = (cache, tokens, generated);
        Ok(())
    }

    /// Writes the conversation and the state to a file, atomically.
    ///
    /// # Errors
    /// A conversation that has not begun; a file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        if self.tokens.is_empty() {
            return Err(ModelError::Unsupported {
                what: "saving a session in which nothing was read yet".into(),
                found_in: None,
                hint: "say something first, or give a document".into(),
            });
        }
        file::write(path, self)
    }

    /// Whether a file is a session, of any model, even if damaged.
    pub fn is_saved_in(path: &Path) -> bool {
        file::is_one(path)
    }

    /// Removes everything but the system message.
    ///
    /// # Errors
    /// Too little memory.
    pub fn clear(&mut self) -> Result<()> {
        self.messages.retain(|message| message.role() == SYSTEM);
        (self.document, self.generated) = (None, None);
        self.forget()
    }

    /// Changes or removes the system message. The next turn reads the whole conversation again.
    pub fn set_system(&mut self, system: Option<&str>) {
        self.messages.retain(|message| message.role() != SYSTEM);
        if let Some(text) = system {
            self.messages.insert(0, Message::new(SYSTEM, text));
        }
    }

    /// Resets the state, not the messages.
    fn forget(&mut self) -> Result<()> {
        self.cache = self.model.new_cache(1, self.rows)?;
        self.tokens.clear();
        Ok(())
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Whether there is no message yet but a system message or a document.
    pub fn is_new(&self) -> bool {
        self.messages.iter().all(|message| message.role() == SYSTEM)
    }

    /// The system message.
    pub fn system(&self) -> Option<&str> {
        let system = self.messages.iter().find(|message| message.role() == SYSTEM)?;
        system.object().get("content")?.as_str()
    }

    /// The document that was read but not asked about yet, if there is one.
    pub fn document(&self) -> Option<&str> {
        self.document.as_deref()
    }

    /// Dtype of the state's exact rows.
    pub fn rows(&self) -> RowDtype {
        self.rows
    }

    /// Tokens that the model's base was trained for.
    pub fn trained_tokens(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    /// Tokens that the state has read.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Bytes of the attention state.
    pub fn cache_bytes(&self) -> usize {
        self.cache.size_bytes()
    }

    /// Bytes of a dense cache of as many tokens in bf16.
    pub fn dense_bytes(&self) -> usize {
        let bytes = self.model.config().dense_cache_bytes(self.tokens(), RowDtype::Bf16);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    fn identity(&self) -> Result<&str> {
        if let Some(known) = self.identity.get() {
            return Ok(known);
        }
        let identity = file::identity(&self.model)?;
        Ok(self.identity.get_or_init(|| identity))
    }

    /// Reads more tokens of a prompt that begins with `tokens`.
    fn read_on(
        &mut self,
        tokens: Vec<u32>,
        cancel: &Cancel,
        each: impl Fn(usize, usize) + Sync,
    ) -> Result<bool> {
        let (mut cache, start, reread) = self.state_for(&tokens)?;
        let new = &tokens[start..];
        each(0, new.len());
        self.model.read_blocks(new, &mut cache, (Wanted::Last, cancel), |block, _| {
            each(block.len(), new.len());
            Ok::<_, ModelError>(())
        })?;
        (self.cache, self.tokens) = (cache, tokens);
        Ok(reread)
    }

    /// A copy of the state and how many of `tokens` it has read. If they do not continue the state: an empty state, and `true`.
    fn state_for(&self, tokens: &[u32]) -> Result<(Cache, usize, bool)> {
        let read = self.tokens.len();
        match tokens.len() > read && tokens.starts_with(&self.tokens) {
            true => Ok((self.cache.clone(), read, false)),
            false => Ok((self.model.new_cache(1, self.rows)?, 0, read > 0)),
        }
    }
}

const SYSTEM: &str = "system";

fn check_template(model: &Model) -> Result<()> {
    match model.tokenizer.chat_template() {
        Some(_) => Ok(()),
        None => Err(ModelError::Unsupported {
            what: "chat with a model that has no chat template".into(),
            found_in: None,
            hint: "use an instruction-tuned model, or `still generate`".into(),
        }),
    }
}

impl Model {
    /// BLAKE3, in hexadecimal, over everything that a saved state depends on: base weights, configuration and learned tensors.
    ///
    /// # Errors
    /// Base weights that cannot be read again.
    pub fn state_identity(&self) -> Result<String> {
        file::identity(self)
    }
}
