//! A document, read as the beginning of the next question.

use super::ChatSession;
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};

/// Stands between a document and a question. Of the forms that were tried (docs/chat.md), small models answer this one best.
const BETWEEN: &str = "\n\nAnswer the question using the text above.\nQuestion: ";

/// A question about a document, as one message of the user: what [`ChatSession::read_document`] and [`ChatSession::ask`] say.
pub fn message_about(document: &str, question: &str) -> String {
    asked(document, question)
}

/// A question about a document, as one message. The line breaks with which files end are none of a document's text: three in a row
/// are another token than the two of [`BETWEEN`], one that small models answer worse.
pub(super) fn asked(document: &str, question: &str) -> String {
    format!("{}{BETWEEN}{}", document.trim_end(), question.trim())
}

impl ChatSession {
    /// Reads a document as the beginning of the next message. `each` is told how many more of how many tokens have been read, from
    /// several threads. Returns whether all that was said before was read again.
    ///
    /// # Errors
    /// What the template refuses, or a template that leaves no beginning in common to questions; [`ModelError::Cancelled`]. The
    /// conversation is then as before.
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

    /// Whether a text was said as a message, or read as a document.
    pub fn knows(&self, text: &str) -> bool {
        let beginning = asked(text, "");
        let said = |message: &crate::chat::Message| {
            let content = message.object().get("content").and_then(serde_json::Value::as_str);
            content.is_some_and(|content| content == text || content.starts_with(&beginning))
        };
        self.document().map(str::trim_end) == Some(text.trim_end())
            || self.messages().iter().any(said)
    }

    /// The tokens that prompts of any question about a document begin with.
    fn shared_beginning(&self, document: &str, cancel: &Cancel) -> Result<Vec<u32>> {
        // Two that begin alike in nothing.
        let (_, mut one) = self.prompt(&asked(document, "What?"))?;
        // A long document takes a second or two, twice.
        if cancel.is_raised() {
            return Err(ModelError::Cancelled);
        }
        let (_, other) = self.prompt(&asked(document, "1"))?;
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
