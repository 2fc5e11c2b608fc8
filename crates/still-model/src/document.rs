//! A document that a model has read, and questions about it.
//!
//! The model reads the document once. Every question starts from a copy of the state after it, so that answers do not depend on
//! earlier questions, and a state that was [saved](Document::save) answers without reading again.

use std::ops::ControlFlow;
use std::path::Path;

use still_attention::RowDtype;

use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::chat::Message;
use crate::error::{ModelError, Result};
use crate::generate::{GenerateOptions, Generation, generate};
use crate::model::Model;
use crate::session_file::{self, Session};

/// Stands between a document and a question.
const BETWEEN: &str = "\n\n";

/// A document in a model's state.
#[derive(Clone, Debug)]
pub struct Document {
    model: Model,
    session: Session,
    cache: Cache,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What was generated.
    pub generation: Generation,
    /// Tokens that were read before the first of the answer.
    pub read: usize,
    /// The question changed how the end of the document is cut into tokens, so that all was read again.
    pub reread: bool,
}

impl Document {
    /// Reads `text` by the model's chat template, as the beginning of a user's message. `each` is told how many more of how many tokens
    /// have been read, from several threads.
    ///
    /// # Errors
    /// A model without a chat template; a text that leaves no room in it; [`ModelError::Cancelled`].
    pub fn read(
        model: Model,
        rows: RowDtype,
        text: String,
        system: Option<String>,
        cancel: &Cancel,
        each: impl Fn(usize, usize) + Sync,
    ) -> Result<Self> {
        let tokens = shared_beginning(&model, &text, system.as_deref())?;
        let mut cache = model.new_cache(1, rows)?;
        let total = tokens.len();
        each(0, total);
        model.read_until(&tokens, &mut cache, cancel, |_, hidden| {
            each(hidden.dim(0)?, total);
            Ok::<_, ModelError>(())
        })?;
        Ok(Self { session: Session { text, system, rows, tokens }, model, cache })
    }

    /// A document that was [saved](Self::save) for this model.
    ///
    /// # Errors
    /// A file that is damaged, or of another model or format.
    pub fn open(model: Model, path: &Path) -> Result<Self> {
        let (session, tensors) = session_file::read(path, &model)?;
        let mut cache = model.new_cache(1, session.rows)?;
        cache.restore(tensors).map_err(|error| ModelError::corrupt(path, error.to_string()))?;
        if cache.position(0) != session.tokens.len() {
            let (has, says) = (cache.position(0), session.tokens.len());
            let what = format!("its state has read {has} tokens, and it says {says}");
            return Err(ModelError::corrupt(path, what));
        }
        Ok(Self { model, session, cache })
    }

    /// Writes the state and the document to a file, in a single step.
    ///
    /// # Errors
    /// A file that cannot be written; a state on a GPU.
    pub fn save(&self, path: &Path) -> Result<()> {
        session_file::write(path, &self.model, &self.session, &self.cache)
    }

    /// Answers a question about the document.
    ///
    /// # Errors
    /// As [`generate`]; what the template refuses.
    pub fn ask(
        &self,
        question: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let Session { text, system, rows, tokens } = &self.session;
        let ids = prompt(&self.model, text, system.as_deref(), question)?;
        // The template may have the time in it, and the end of the text may merge with the question.
        let reread = !(ids.starts_with(tokens) && ids.len() > tokens.len());
        let (mut cache, new) = match reread {
            false => (self.cache.clone(), &ids[tokens.len()..]),
            true => (self.model.new_cache(1, *rows)?, &ids[..]),
        };
        let generation = generate(&self.model, new, &mut cache, options, on_text)?;
        Ok(Answer { generation, read: new.len(), reread })
    }

    /// The document.
    pub fn text(&self) -> &str {
        &self.session.text
    }

    /// The system message before it.
    pub fn system(&self) -> Option<&str> {
        self.session.system.as_deref()
    }

    /// Tokens of the document and of what the template puts before it.
    pub fn tokens(&self) -> usize {
        self.session.tokens.len()
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
}

/// The prompt of a question, through the model's template.
fn prompt(model: &Model, text: &str, system: Option<&str>, question: &str) -> Result<Vec<u32>> {
    let Some(template) = model.tokenizer.chat_template() else {
        return Err(ModelError::Unsupported {
            what: "a question to a model that has no chat template".into(),
            found_in: None,
            hint: "use an instruction-tuned model, or `still generate --prompt-file`".into(),
        });
    };
    let system = system.map(|system| Message::new("system", system));
    let user = Message::new("user", format!("{text}{BETWEEN}{question}"));
    let messages: Vec<Message> = system.into_iter().chain([user]).collect();
    if messages.len() > 1 && template.ignores(&messages, "system")? {
        let what = "it writes nothing of what system messages say: leave out the system message";
        return Err(ModelError::ChatTemplate(what.into()));
    }
    model.tokenizer.encode(&template.render(&messages, true)?, false)
}

/// The tokens that prompts of any question begin with.
fn shared_beginning(model: &Model, text: &str, system: Option<&str>) -> Result<Vec<u32>> {
    // Two that begin alike in nothing.
    let mut one = prompt(model, text, system, "What?")?;
    let other = prompt(model, text, system, "1")?;
    let shared = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
    one.truncate(shared);
    match one.is_empty() {
        false => Ok(one),
        true => Err(ModelError::ChatTemplate(
            "it writes different questions about one text differently from the first token on"
                .into(),
        )),
    }
}
