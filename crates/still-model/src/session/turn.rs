//! One question and its answer.

use std::ops::ControlFlow;

use super::{ChatSession, Generated, document};
use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::chat::Message;
use crate::error::{ModelError, Result};
use crate::generate::{GenerateOptions, Generation, generate};

/// One answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The generated turn.
    pub generation: Generation,
    /// Tokens that this turn read before it generated.
    pub read: usize,
    /// Whether the whole conversation was read again, because the template renders earlier turns differently or the system
    /// message changed.
    pub reread: bool,
    /// Bytes of the attention state after it.
    pub cache_bytes: usize,
    /// Tokens that this state has read.
    pub tokens: usize,
}

/// The result of a turn.
struct Turn {
    reply: Reply,
    /// The message, with its document.
    content: String,
    cache: Cache,
    tokens: Vec<u32>,
    generated: Option<Generated>,
}

impl ChatSession {
    /// Sends a message and generates the answer. It reads only tokens that the state has not read, as long as the rendered
    /// conversation extends the state's tokens.
    ///
    /// # Errors
    /// Errors of the template or the model; a system message that the template ignores. The conversation is unchanged then.
    pub fn send(
        &mut self,
        text: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let Turn { reply, content, cache, tokens, generated } =
            self.turn(text, options, on_text)?;
        self.messages.push(Message::new("user", content));
        self.messages.push(Message::new("assistant", reply.generation.text.clone()));
        self.document = None;
        (self.cache, self.tokens, self.generated) = (cache, tokens, generated);
        Ok(reply)
    }

    /// [`ChatSession::send`], but the conversation stays unchanged, so that answers do not depend on earlier questions.
    ///
    /// # Errors
    /// As there.
    pub fn ask(
        &self,
        question: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply> {
        Ok(self.turn(question, options, on_text)?.reply)
    }

    fn turn(
        &self,
        text: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Turn> {
        let content = match &self.document {
            Some(document) => document::asked(document, text),
            None => text.to_owned(),
        };
        let (rendered, ids) = self.prompt(&content, &options.cancel)?;
        let (mut cache, start, reread) = self.state_for(&ids)?;
        let generation = generate(&self.model, &ids[start..], &mut cache, options, on_text)?;
        let mut tokens = ids;
        let read = tokens.len() - start;
        let generated = self.generated_by(rendered, &tokens, &generation)?;
        tokens.extend(&generation.ids[..generation.fed]);
        let cache_bytes = cache.size_bytes();
        let reply = Reply { generation, read, reread, cache_bytes, tokens: tokens.len() };
        Ok(Turn { reply, content, cache, tokens, generated })
    }

    /// The conversation with one more message of the user, rendered and in tokens.
    pub(super) fn prompt(&self, content: &str, cancel: &Cancel) -> Result<(String, Vec<u32>)> {
        let Some(template) = self.model.tokenizer.chat_template() else {
            return Err(ModelError::ChatTemplate("the model has none".into()));
        };
        let mut messages = self.messages.clone();
        messages.push(Message::new("user", content));
        if self.system().is_some() && template.ignores(&messages, super::SYSTEM)? {
            let what =
                "it writes nothing of what system messages say: leave out the system message";
            return Err(ModelError::ChatTemplate(what.into()));
        }
        let rendered = template.render(&messages, true)?;
        let ids = self.encode(&rendered, cancel)?;
        Ok((rendered, ids))
    }

    /// Tokens of a rendered conversation. Generated text keeps its generated tokens.
    fn encode(&self, rendered: &str, cancel: &Cancel) -> Result<Vec<u32>> {
        let tokenizer = &self.model.tokenizer;
        let ids = tokenizer.encode_long(rendered, cancel)?;
        if ids.starts_with(&self.tokens) {
            return Ok(ids);
        }
        let Some(generated) = &self.generated else { return Ok(ids) };
        let Some(rest) = rendered.strip_prefix(&generated.text) else { return Ok(ids) };
        let rest = tokenizer.encode_long(rest, cancel)?;
        // Only where a special token follows is it certain that the two have no token in common.
        match rest.first().is_some_and(|&id| tokenizer.is_special(id)) {
            true => Ok([&generated.tokens[..], &rest].concat()),
            false => Ok(ids),
        }
    }

    /// The conversation that ends with a generation, unless its text is not that of its tokens: it was cut at a stop string, or
    /// they are not UTF-8.
    fn generated_by(
        &self,
        mut rendered: String,
        prompt: &[u32],
        generation: &Generation,
    ) -> Result<Option<Generated>> {
        let text = self.model.tokenizer.decode(&generation.ids, false)?;
        if text != generation.text || text.contains(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        rendered.push_str(&text);
        Ok(Some(Generated { text: rendered, tokens: [prompt, &generation.ids].concat() }))
    }
}

#[cfg(test)]
mod tests {
    use still_attention::RowDtype;

    use super::*;
    use crate::random::{random_model, tiny_config};

    /// A model may write a text in other tokens than the tokenizer does.
    #[test]
    fn the_models_own_tokens_are_continued_where_a_special_token_follows() {
        let model = random_model(tiny_config(), 1).unwrap();
        let mut session = ChatSession::new(model, RowDtype::F32, None).unwrap();
        let tokenizer = session.model.tokenizer.clone();
        let encode = |text: &str| tokenizer.encode(text, false).unwrap();
        let prompt = "<|im_start|>user\nHi<|im_end|>\n";
        // Tokens that nothing encodes to; the state has not read the last.
        let tokens = [encode(prompt), vec![250, 251]].concat();
        session.tokens = tokens[..tokens.len() - 1].to_vec();
        session.generated = Some(Generated { text: format!("{prompt}Ho"), tokens: tokens.clone() });

        let rest = "<|im_end|>\n<|im_start|>user\nGo on";
        let rendered = format!("{prompt}Ho{rest}");
        assert_eq!(
            session.encode(&rendered, &Cancel::default()).unwrap(),
            [tokens, encode(rest)].concat()
        );
        // Tokens might have merged over the border, or the reply is another.
        for other in [format!("{prompt}Ho, go on"), format!("{prompt}Hm{rest}")] {
            assert_eq!(session.encode(&other, &Cancel::default()).unwrap(), encode(&other));
        }
        // Tokens that the tokenizer gives too are the tokenizer's.
        session.tokens = encode(prompt);
        assert_eq!(session.encode(&rendered, &Cancel::default()).unwrap(), encode(&rendered));
    }

    #[test]
    fn a_text_that_is_not_that_of_its_tokens_is_not_continued() {
        let model = random_model(tiny_config(), 1).unwrap();
        let session = ChatSession::new(model, RowDtype::F32, None).unwrap();
        let ids = session.model.tokenizer.encode("Ho ho", false).unwrap();
        let of = |text: &str, ids: &[u32]| {
            let generation = Generation {
                ids: ids.to_vec(),
                fed: ids.len(),
                text: text.into(),
                finish: crate::Finish::Length,
                warning: None,
                prefill_seconds: 0.0,
                decode_seconds: 0.0,
            };
            session.generated_by("Hi".into(), &[1], &generation).unwrap()
        };
        let expected = Generated { text: "HiHo ho".into(), tokens: [&[1], &ids[..]].concat() };
        assert_eq!(of("Ho ho", &ids), Some(expected));
        // Cut at a stop string, or no UTF-8.
        assert_eq!(of("Ho", &ids), None);
        assert_eq!(of("\u{fffd}", &[255]), None);
    }
}
