//! Conversations whose attention state is kept: between turns, and in a file.
//!
//! | file | content |
//! |---|---|
//! | `turn` | one question and its answer |
//! | `document` | a document, read as the beginning of the next question |
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
use crate::model::Model;

pub use self::document::message_about;
pub use self::sequence::SavedSequence;
pub use self::turn::Reply;

/// A conversation with a model: what was said, perhaps a document that was read and not asked about yet, and the state after it.
///
/// The state is continued as long as the rendered conversation extends what was read. A turn computes on a copy of the state, so
/// that one that fails or is cancelled leaves the conversation as it was.
#[derive(Debug)]
pub struct ChatSession {
    model: Model,
    rows: RowDtype,
    messages: Vec<Message>,
    document: Option<String>,
    cache: Cache,
    /// What the state has read.
    tokens: Vec<u32>,
    generated: Option<Generated>,
    /// [`file::identity`] of the model, once it is known.
    identity: OnceLock<String>,
}

/// A conversation that ends with the model's own tokens.
///
/// Their text may encode to other tokens. What is said next continues these.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Generated {
    /// Prompt and answer.
    text: String,
    /// Of both.
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

    /// Goes on with a session that was [saved](Self::save) for this model, in place of this conversation. Its rows are stored as
    /// they were.
    ///
    /// # Errors
    /// A file that is damaged, or of another model or format; the conversation is then as before.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let (saved, tensors) = file::read(path, self.identity()?)?;
        let empty = self.model.new_cache(1, saved.rows)?;
        let cache = sequence::restored(empty, path, &saved.tokens, tensors)?;
        let file::Saved { rows, messages, document, tokens, generated } = saved;
        (self.rows, self.messages, self.document) = (rows, messages, document);
        (self.cache, self.tokens, self.generated) = (cache, tokens, generated);
        Ok(())
    }

    /// Writes the conversation and the state to a file, in a single step.
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

    /// Whether a file is a session, of whatever model, and be it damaged.
    pub fn is_saved_in(path: &Path) -> bool {
        file::is_one(path)
    }

    /// Forgets everything but the system message.
    ///
    /// # Errors
    /// Too little memory.
    pub fn clear(&mut self) -> Result<()> {
        self.messages.retain(|message| message.role() == SYSTEM);
        (self.document, self.generated) = (None, None);
        self.forget()
    }

    /// Changes the system message, or takes it away. The next turn reads everything again.
    pub fn set_system(&mut self, system: Option<&str>) {
        self.messages.retain(|message| message.role() != SYSTEM);
        if let Some(text) = system {
            self.messages.insert(0, Message::new(SYSTEM, text));
        }
    }

    /// Forgets what was read, not what was said.
    fn forget(&mut self) -> Result<()> {
        self.cache = self.model.new_cache(1, self.rows)?;
        self.tokens.clear();
        Ok(())
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Whether nothing was said yet: a system message or a document alone is no conversation.
    pub fn is_new(&self) -> bool {
        self.messages.iter().all(|message| message.role() == SYSTEM)
    }

    /// The system message.
    pub fn system(&self) -> Option<&str> {
        let system = self.messages.iter().find(|message| message.role() == SYSTEM)?;
        system.object().get("content")?.as_str()
    }

    /// The document that the next question is about, if it was read and not asked about yet.
    pub fn document(&self) -> Option<&str> {
        self.document.as_deref()
    }

    /// How the state stores exact rows.
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

    /// Has the state read more of the prompt that `tokens` begins.
    fn read_on(
        &mut self,
        tokens: Vec<u32>,
        cancel: &Cancel,
        each: impl Fn(usize, usize) + Sync,
    ) -> Result<bool> {
        let (mut cache, start, reread) = self.state_for(&tokens)?;
        let new = &tokens[start..];
        each(0, new.len());
        self.model.read_until(new, &mut cache, cancel, |_, hidden| {
            each(hidden.dim(0)?, new.len());
            Ok::<_, ModelError>(())
        })?;
        (self.cache, self.tokens) = (cache, tokens);
        Ok(reread)
    }

    /// A copy of the state and how much of `tokens` it has read; an empty one if they do not continue what was read, and whether
    /// that is so.
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
    /// BLAKE3, in hexadecimal, over all that a saved state depends on: base weights, configuration, and what a student has learned.
    ///
    /// # Errors
    /// Base weights that cannot be read again.
    pub fn state_identity(&self) -> Result<String> {
        file::identity(self)
    }
}
