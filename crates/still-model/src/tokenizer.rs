//! Text to token ids and back.

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::gguf_file::Content;
use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::chat::{self, ChatTemplate};
use crate::error::{ModelError, Result};

/// A model's tokenizer and chat template.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    chat_template: Option<ChatTemplate>,
    /// `tokenizer_config.json`, kept to be saved beside a student.
    config: Value,
}

/// How Llama 3 cuts text before the merges.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Qwen2 does: digits one by one.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// First byte and the one after the last.
pub type Span = (usize, usize);

impl Tokenizer {
    /// From a tokenizer made in memory.
    pub fn new(inner: tokenizers::Tokenizer, chat_template: Option<ChatTemplate>) -> Self {
        let config = match &chat_template {
            Some(template) => json!({ "chat_template": template.source() }),
            None => json!({}),
        };
        Self { inner: Arc::new(inner), chat_template, config }
    }

    /// Reads `tokenizer.json` and, if there, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
    /// `additional_chat_templates`. Templates are parsed on first use.
    ///
    /// # Errors
    /// A missing or broken file.
    pub fn from_hf_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(ModelError::read(&path))?;
        let config_path = dir.join("tokenizer_config.json");
        let mut config = json_if_there(&config_path)?.unwrap_or_else(|| json!({}));
        let tokens_path = dir.join("special_tokens_map.json");
        if let Some(tokens) = json_if_there(&tokens_path)? {
            chat::add_special_tokens(&mut config, tokens);
        }
        let origin = chat::read_template_files(dir, &mut config)?;
        let origin = origin.unwrap_or_else(|| config_path.display().to_string());
        Self::from_parts(&bytes, config, &path, origin)
    }

    /// From the contents of `tokenizer.json`, found in the file `path`, and of `tokenizer_config.json`.
    ///
    /// # Errors
    /// If they are not what they should be.
    pub fn from_json(tokenizer: &[u8], config: Value, path: &Path) -> Result<Self> {
        Self::from_parts(tokenizer, config, path, path.display().to_string())
    }

    /// [`Tokenizer::from_json`] with the file that the chat template is from.
    fn from_parts(tokenizer: &[u8], config: Value, path: &Path, origin: String) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(tokenizer)
            .map_err(|error| ModelError::corrupt(path, format!("not a tokenizer: {error}")))?;
        let chat_template = chat::template_in(&config, Some(origin))?;
        Ok(Self { inner: Arc::new(inner), chat_template, config })
    }

    /// What [`Tokenizer::from_json`] reads: the contents of `tokenizer.json` and of `tokenizer_config.json`.
    ///
    /// # Errors
    /// Whatever the tokenizer library refuses.
    pub fn to_json(&self) -> Result<(String, &Value)> {
        let tokenizer =
            self.inner.to_string(false).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        Ok((tokenizer, &self.config))
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// A vocabulary that is not byte-level BPE, an unknown pre-tokenizer (both named), missing entries.
    pub fn from_gguf(path: &Path, content: &Content) -> Result<Self> {
        let unsupported = |what: String, hint: &str| ModelError::Unsupported {
            what,
            found_in: Some(path.to_path_buf()),
            hint: hint.into(),
        };
        let missing = |key: &str| ModelError::corrupt(path, format!("{key} is missing"));
        let text = |key: &str| content.metadata.get(key).and_then(|v| v.to_string().ok().cloned());
        let list = |key: &str| {
            let values = content.metadata.get(key).and_then(|v| v.to_vec().ok());
            values.ok_or_else(|| missing(key))
        };
        let kind = text("tokenizer.ggml.model").ok_or_else(|| missing("tokenizer.ggml.model"))?;
        if kind != "gpt2" {
            return Err(unsupported(
                format!("tokenizer.ggml.model \"{kind}\""),
                "only byte-level BPE (\"gpt2\") is read from GGUF: use the safetensors checkpoint",
            ));
        }
        let pre = text("tokenizer.ggml.pre").unwrap_or_else(|| "default".into());

        let mut vocab = tokenizers::models::bpe::Vocab::default();
        let mut tokens = Vec::new();
        for (id, value) in list("tokenizer.ggml.tokens")?.iter().enumerate() {
            let token = value.to_string().map_err(|_| missing("tokenizer.ggml.tokens"))?;
            vocab.insert(token.clone(), id as u32);
            tokens.push(token.clone());
        }
        let merges = list("tokenizer.ggml.merges")?
            .iter()
            .map(|value| {
                let pair = value.to_string().ok().and_then(|merge| merge.split_once(' '));
                let (left, right) = pair.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
                Ok((left.to_owned(), right.to_owned()))
            })
            .collect::<Result<Vec<_>>>()?;
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre == "llama-bpe")
            .build()
            .map_err(|error| ModelError::corrupt(path, format!("unusable merges: {error}")))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);

        let byte_level =
            |regex| tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, true, regex);
        let split = |pattern: &str| {
            Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false)
                .map_err(|error| ModelError::Tokenizer(error.to_string()))
        };
        let steps: Vec<PreTokenizerWrapper> = match pre.as_str() {
            "gpt-2" => vec![byte_level(true).into()],
            "smollm" => vec![Digits::new(true).into(), byte_level(true).into()],
            "llama-bpe" => vec![split(LLAMA3_SPLIT)?.into(), byte_level(false).into()],
            "qwen2" => {
                inner.with_normalizer(Some(NFC));
                vec![split(QWEN2_SPLIT)?.into(), byte_level(false).into()]
            }
            other => {
                return Err(unsupported(
                    format!("tokenizer.ggml.pre \"{other}\""),
                    "known: gpt-2, smollm, llama-bpe, qwen2; use the safetensors checkpoint",
                ));
            }
        };
        inner.with_pre_tokenizer(Some(Sequence::new(steps)));
        inner.with_decoder(Some(ByteLevel::default()));

        // Kinds 3 (control) and 4 (user-defined) are matched whole.
        let kinds = list("tokenizer.ggml.token_type")?;
        let added: Vec<AddedToken> = tokens
            .iter()
            .zip(kinds)
            .filter_map(|(token, kind)| match kind.to_i32() {
                Ok(3) => Some(AddedToken::from(token.clone(), true).normalized(false)),
                Ok(4) => Some(AddedToken::from(token.clone(), false).normalized(false)),
                _ => None,
            })
            .collect();
        for token in added {
            let tokens = [token];
            if tokens[0].special {
                inner.add_special_tokens(&tokens);
            } else {
                inner.add_tokens(&tokens);
            }
        }

        let token = |key: &str| {
            let id =
                content.metadata.get(&format!("tokenizer.ggml.{key}_token_id"))?.to_u32().ok()?;
            tokens.get(id as usize).cloned()
        };
        let (bos, eos) = (token("bos"), token("eos"));
        let mut config = json!({ "bos_token": bos, "eos_token": eos });
        let names = content.metadata.get("tokenizer.chat_templates").and_then(|v| v.to_vec().ok());
        let names = names.into_iter().flatten().filter_map(|name| name.to_string().ok().cloned());
        chat::add_gguf_templates(&mut config, names, &text);
        let chat_template = chat::template_in(&config, Some(path.display().to_string()))?;
        Ok(Self { inner: Arc::new(inner), chat_template, config })
    }

    /// Token ids of a text; `add_special` adds what the tokenizer puts around a document.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| ModelError::Tokenizer(e.to_string()))?;
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
        let encoding = self
            .inner
            .encode(text, add_special)
            .map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| ModelError::Tokenizer(e.to_string()))
    }

    /// One token as text, for display.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_else(|_| format!("<{id}>"))
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token given literally.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
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
        TokenStream { tokenizer: self.clone(), pending: Vec::new(), shown: 0 }
    }
}

/// Decodes ids one by one; a character is given out once it is complete.
#[derive(Clone, Debug)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    /// Ids since the last safe boundary.
    pending: Vec<u32>,
    /// Bytes of their text already given out.
    shown: usize,
}

impl TokenStream {
    /// Adds an id; returns the text that became certain, if any.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.pending.push(id);
        let text = self.tokenizer.decode(&self.pending, true)?;
        // An incomplete character decodes to the replacement character: wait for the rest of it.
        if text.ends_with('\u{FFFD}')
            || text.len() <= self.shown
            || !text.is_char_boundary(self.shown)
        {
            return Ok(None);
        }
        let new = text[self.shown..].to_owned();
        self.shown = text.len();
        // A long run would be decoded again and again: start over at a boundary that cannot merge.
        if self.pending.len() > 32 && new.ends_with(char::is_alphanumeric) {
            self.pending.clear();
            self.shown = 0;
        }
        Ok(Some(new))
    }

    /// What is left at the end, incomplete characters included.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn finish(self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.pending, true)?;
        Ok(text.get(self.shown..).filter(|rest| !rest.is_empty()).map(str::to_owned))
    }
}

/// An object in a file, if the file is there.
fn json_if_there(path: &Path) -> Result<Option<Value>> {
    let Some(text) = crate::files::read_if_there(path)? else {
        return Ok(None);
    };
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| ModelError::corrupt(path, format!("not valid JSON: {error}")))?;
    match value.is_object() {
        true => Ok(Some(value)),
        false => Err(ModelError::corrupt(path, "not a JSON object")),
    }
}
