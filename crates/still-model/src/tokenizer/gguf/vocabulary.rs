//! Tokens, their kinds and scores, as a GGUF file has them.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::AddedToken;

use super::end;
use crate::error::{ModelError, Result};

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Part of a text.
    Normal,
    /// Stands for what has no token.
    Unknown,
    /// Matched whole, never shown.
    Control,
    /// Matched whole, shown.
    UserDefined,
    /// A byte, as in `<0x0A>`.
    Byte,
}

/// What a kind of vocabulary does about `bos` or `eos` where the file is silent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usual {
    pub id: Option<usize>,
    pub add: bool,
}

/// The vocabulary of a GGUF file.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    path: &'a Path,
    content: &'a Content,
    /// By id.
    pub tokens: Vec<String>,
    /// By id.
    pub kinds: Vec<Kind>,
    ids: HashMap<String, u32>,
}

impl<'a> Vocabulary<'a> {
    pub fn read(path: &'a Path, content: &'a Content) -> Result<Self> {
        let mut vocabulary =
            Self { path, content, tokens: Vec::new(), kinds: Vec::new(), ids: HashMap::new() };
        let tokens = vocabulary.list("tokenizer.ggml.tokens")?;
        for (id, token) in tokens.iter().enumerate() {
            let token = token.to_string().map_err(|_| {
                vocabulary.corrupt("tokenizer.ggml.tokens has an entry that is no text")
            })?;
            // llama.cpp's name for a token without text.
            let token = if token.is_empty() { format!("[EMPTY_{id}]") } else { token.clone() };
            if let Some(first) = vocabulary.ids.insert(token.clone(), id as u32) {
                return Err(
                    vocabulary.corrupt(format!("token {token:?} has two ids, {first} and {id}"))
                );
            }
            vocabulary.tokens.push(token);
        }
        if vocabulary.tokens.is_empty() {
            return Err(vocabulary.corrupt("tokenizer.ggml.tokens is empty"));
        }
        let kinds = vocabulary.list("tokenizer.ggml.token_type")?;
        if kinds.len() != vocabulary.tokens.len() {
            return Err(vocabulary.corrupt(format!(
                "{} tokens, but {} entries in tokenizer.ggml.token_type",
                vocabulary.tokens.len(),
                kinds.len()
            )));
        }
        let ends = end::tokens(&vocabulary.tokens);
        let kind = |(id, kind): (usize, &Value)| match end::as_id(kind)? {
            // Tokens that end a generation are control tokens, whatever a converter wrote.
            _ if ends.contains(&(id as u32)) => Some(Kind::Control),
            2 => Some(Kind::Unknown),
            3 => Some(Kind::Control),
            4 => Some(Kind::UserDefined),
            6 => Some(Kind::Byte),
            _ => Some(Kind::Normal),
        };
        let kinds = kinds.iter().enumerate().map(kind).collect::<Option<Vec<_>>>();
        vocabulary.kinds = kinds.ok_or_else(|| {
            vocabulary.corrupt("tokenizer.ggml.token_type has an entry that is no type")
        })?;
        Ok(vocabulary)
    }

    pub fn corrupt(&self, reason: impl Into<String>) -> ModelError {
        ModelError::corrupt(self.path, reason)
    }

    pub fn missing(&self, key: &str) -> ModelError {
        self.corrupt(format!("{key} is missing"))
    }

    pub fn unsupported(&self, what: String, hint: String) -> ModelError {
        ModelError::Unsupported { what, found_in: Some(self.path.to_path_buf()), hint }
    }

    fn wrong(&self, key: &str, expected: &str) -> ModelError {
        self.corrupt(format!("{key} is not {expected}"))
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        let value = self.content.metadata.get(key);
        value
            .map(|value| value.to_string().cloned().map_err(|_| self.wrong(key, "a text")))
            .transpose()
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let value = self.content.metadata.get(key);
        value.map(|value| value.to_bool().map_err(|_| self.wrong(key, "true or false"))).transpose()
    }

    pub fn list(&self, key: &str) -> Result<&'a [Value]> {
        match self.content.metadata.get(key) {
            Some(Value::Array(values)) => Ok(values),
            Some(_) => Err(self.wrong(key, "a list")),
            None => Err(self.missing(key)),
        }
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub fn vocab(&self) -> tokenizers::models::bpe::Vocab {
        self.ids.iter().map(|(token, id)| (token.clone(), *id)).collect()
    }

    /// The token that an id of the file names.
    pub fn special(&self, which: &str) -> Result<Option<String>> {
        let key = format!("tokenizer.ggml.{which}_token_id");
        let value = match self.content.metadata.get(&key) {
            // Some converters write "none" so.
            None | Some(Value::I32(-1) | Value::I64(-1) | Value::U32(u32::MAX)) => return Ok(None),
            Some(value) => value,
        };
        let id = end::as_id(value).ok_or_else(|| self.wrong(&key, "a token id"))?;
        let token = self.tokens.get(id as usize).ok_or_else(|| {
            self.corrupt(format!("{key} is {id}, but there are {} tokens", self.tokens.len()))
        })?;
        Ok(Some(token.clone()))
    }

    /// The `bos` or `eos` token and whether a document gets it.
    pub fn around(&self, which: &str, usual: Usual) -> Result<(Option<String>, bool)> {
        let key = format!("tokenizer.ggml.add_{which}_token");
        let at = usual.id.filter(|&id| self.kinds.get(id) == Some(&Kind::Control));
        let token = self.special(which)?.or_else(|| Some(self.tokens[at?].clone()));
        match self.flag(&key)? {
            Some(true) if token.is_none() => {
                Err(self.corrupt(format!("{key} is true, but {which}_token_id is missing")))
            }
            Some(add) => Ok((token, add)),
            None => {
                let add = usual.add && token.is_some();
                Ok((token, add))
            }
        }
    }

    /// Tokens that are found in a text before anything else is done with it.
    pub fn matched_whole(&self) -> impl Iterator<Item = AddedToken> {
        self.tokens.iter().zip(&self.kinds).filter_map(|(token, kind)| match kind {
            Kind::Control | Kind::Unknown => {
                Some(AddedToken::from(token.clone(), true).normalized(false))
            }
            Kind::UserDefined => Some(AddedToken::from(token.clone(), false).normalized(false)),
            Kind::Normal | Kind::Byte => None,
        })
    }
}
