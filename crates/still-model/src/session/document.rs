//! A document that is read before the question about it.

use super::ChatSession;
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};

/// The text between a document and a question. Small models answer this form best, of those tried (docs/chat.md).
const BETWEEN: &str = "\n\nAnswer the question using the text above.\nQuestion: ";

/// A question about a document as one message of the user, as [`ChatSession::read_document`] and [`ChatSession::ask`] send it.
pub fn message_about(document: &str, question: &str) -> String {
    asked(document, question)
}

/// A question about a document, as one message. Line breaks at the document's end are removed: with them, [`BETWEEN`] would begin
/// with another token, which small models answer worse.
pub(super) fn asked(document: &str, question: &str) -> String {
    format!("{}{BETWEEN}{}", document.trim_end(), question.trim())
}

impl ChatSession {
    /// Reads a document as the beginning of the next message. Several threads report the progress to `each`, as `(more, of)`
    /// tokens. Returns whether the whole conversation was read again.
    ///
    /// # Errors
    /// An error of the template; a template with which two questions have no common beginning; [`ModelError::Cancelled`]. The
    /// conversation is unchanged then.
    pub fn read_document(
        &mut self,
        document: String,
        cancel: &Cancel,
        each: impl Fn(usize, usize) + Sync,
    ) -> Result<bool> {
        let tokens = self.shared_beginning(&document, cancel)?;
        let reread = self.read_on(tokens, cancel, each)?;
        self.document = Some(document);
        Ok(reread)
    }

    /// Whether a text is one of the messages, or was read as a document.
    pub fn knows(&self, text: &str) -> bool {
        let beginning = asked(text, "");
        let said = |message: &crate::chat::Message| {
            let content = message.object().get("content").and_then(serde_json::Value::as_str);
            content.is_some_and(|content| content == text || content.starts_with(&beginning))
        };
        self.document().map(str::trim_end) == Some(text.trim_end())
            || self.messages().iter().any(said)
    }

    /// The tokens with which the prompt of every question about a document begins.
    fn shared_beginning(&self, document: &str, cancel: &Cancel) -> Result<Vec<u32>> {
        // Two that begin alike in nothing.
        let (_, mut one) = self.prompt(&asked(document, "What?"), cancel)?;
        let (_, other) = self.prompt(&asked(document, "1"), cancel)?;
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
}
