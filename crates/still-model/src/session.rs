//! Conversations whose attention state is kept between turns.

use std::ops::ControlFlow;

use still_attention::RowDtype;

use crate::cache::Cache;
use crate::chat::Message;
use crate::error::{ModelError, Result};
use crate::generate::{GenerateOptions, Generation, generate};
use crate::model::Model;

/// A conversation with a model.
#[derive(Debug)]
pub struct ChatSession {
    model: Model,
    rows: RowDtype,
    messages: Vec<Message>,
    cache: Cache,
    /// What the cache has been fed.
    fed: Vec<u32>,
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The generated turn.
    pub generation: Generation,
    /// Tokens that were fed for this turn before generating.
    pub read: usize,
    /// The template rewrote earlier turns, so that everything was read again.
    pub reread: bool,
}

impl ChatSession {
    /// An empty conversation, perhaps with a system message.
    ///
    /// # Errors
    /// A model without a chat template.
    pub fn new(model: Model, rows: RowDtype, system: Option<&str>) -> Result<Self> {
        if model.tokenizer.chat_template().is_none() {
            return Err(ModelError::Unsupported {
                what: "chat with a model that has no chat template".into(),
                found_in: None,
                hint: "use an instruction-tuned model, or `still generate`".into(),
            });
        }
        let cache = model.new_cache(1, rows)?;
        let messages = system.map(|text| Message::new("system", text)).into_iter().collect();
        Ok(Self { model, rows, messages, cache, fed: Vec::new() })
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Bytes of the attention state.
    pub fn cache_bytes(&self) -> usize {
        self.cache.size_bytes()
    }

    /// Sends a message and generates the answer. Only tokens that the state has not seen are read, as long as
    /// the rendered conversation extends what it has.
    ///
    /// # Errors
    /// What the template or the model refuses, or a system message that the template ignores; the conversation is then as
    /// before.
    pub fn send(
        &mut self,
        text: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply> {
        self.messages.push(Message::new("user", text));
        let reply = self.answer(options, on_text);
        match &reply {
            Ok(reply) => {
                self.messages.push(Message::new("assistant", reply.generation.text.clone()))
            }
            Err(_) => {
                self.messages.pop();
                // The state may have been fed half of it.
                self.fed.clear();
                self.cache = self.model.new_cache(1, self.rows)?;
            }
        }
        reply
    }

    fn answer(
        &mut self,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let Some(template) = self.model.tokenizer.chat_template() else {
            return Err(ModelError::ChatTemplate("the model has none".into()));
        };
        if self.fed.is_empty() && template.ignores(&self.messages, "system")? {
            let what =
                "it writes nothing of what system messages say: leave out the system message";
            return Err(ModelError::ChatTemplate(what.into()));
        }
        let ids = self.model.tokenizer.encode(&template.render(&self.messages, true)?, false)?;
        let extends = ids.len() > self.fed.len() && ids.starts_with(&self.fed);
        let reread = !extends && !self.fed.is_empty();
        if !extends {
            self.cache = self.model.new_cache(1, self.rows)?;
            self.fed.clear();
        }
        let new = &ids[self.fed.len()..];
        let generation = generate(&self.model, new, &mut self.cache, options, on_text)?;
        let read = new.len();
        self.fed = ids;
        self.fed.extend(&generation.ids[..generation.fed]);
        Ok(Reply { generation, read, reread })
    }
}
