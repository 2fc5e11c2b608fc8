//! `tokenizer.json` and `tokenizer_config.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::{Tokenizer, check, guard, refused};
use crate::chat;
use crate::error::{ModelError, Result};

/// Other forms of a tokenizer, and what is said where one of them is all there is.
const OTHER_FORMS: [(&str, &str); 3] = [
    ("tokenizer.model", "SentencePiece"),
    ("tekken.json", "Mistral's tekken"),
    ("vocab.json", "vocab.json and merges.txt"),
];

impl Tokenizer {
    /// Reads `tokenizer.json` and, if there, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
    /// `additional_chat_templates`. Templates are parsed on first use.
    ///
    /// # Errors
    /// A missing or broken file; another form of tokenizer (named).
    pub fn from_hf_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            refuse_other_forms(dir)?;
        }
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
    /// `truncation` and `padding` are cleared: they are left there by whoever trained the tokenizer, and transformers
    /// ignores them too unless it is asked. Which tokens are put around a document is the post-processor's to say:
    /// `add_bos_token` and `add_eos_token` of the configuration do not count where it is there, as in transformers 5.
    ///
    /// # Errors
    /// If they are not what they should be.
    pub fn from_json(tokenizer: &[u8], config: Value, path: &Path) -> Result<Self> {
        Self::from_parts(tokenizer, config, path, path.display().to_string())
    }

    /// [`Tokenizer::from_json`] with the file that the chat template is from.
    fn from_parts(tokenizer: &[u8], config: Value, path: &Path, origin: String) -> Result<Self> {
        let mut json: Value = serde_json::from_slice(tokenizer)
            .map_err(|error| ModelError::corrupt(path, format!("not a tokenizer: {error}")))?;
        check::check(&json)
            .map_err(|reason| ModelError::corrupt(path, format!("not a tokenizer: {reason}")))?;
        json["truncation"] = Value::Null;
        json["padding"] = Value::Null;
        // As text: the library has the reader of text compiled, and to read a `Value` would compile all of it again.
        let text = json.to_string();
        let loaded = guard::catch(|| {
            let parsed = text.parse::<tokenizers::Tokenizer>();
            parsed.map_err(|error| without_place(&error.to_string()).to_owned())
        });
        let inner = loaded
            .and_then(|loaded| loaded)
            .map_err(|reason| ModelError::corrupt(path, format!("not a tokenizer: {reason}")))?;
        guard::catch(|| try_out(&inner)).map_err(|reason| refused(path, &reason))?;
        let chat_template = chat::template_in(&config, Some(origin))?;
        Ok(Self::assemble(inner, chat_template, config, Some(path)))
    }
}

/// What is wrong, without the place in a text that was made of the file's.
fn without_place(error: &str) -> &str {
    error.rsplit_once(" at line ").map_or(error, |(what, _)| what)
}

/// Encodes and decodes a little of everything: what makes the library panic on any text should not do so after hours of
/// work. That it has no token for some text is no fault.
fn try_out(inner: &tokenizers::Tokenizer) {
    let odd = "\u{e9}\u{301} \u{4f60}\u{597d}\n\t\u{1f469}\u{200d}\u{1f680}";
    for text in ["", "Hello, world! 12 ", "the end", odd] {
        for special in [false, true] {
            if let Ok(encoding) = inner.encode(text, special) {
                // Refused or not: only a panic counts.
                let _ = inner.decode(encoding.get_ids(), !special);
            }
        }
    }
}

fn refuse_other_forms(dir: &Path) -> Result<()> {
    match OTHER_FORMS.iter().find(|(name, _)| dir.join(name).exists()) {
        Some((name, what)) => Err(ModelError::Unsupported {
            what: format!("a tokenizer given as {name} ({what}) without tokenizer.json"),
            found_in: Some(dir.to_path_buf()),
            hint: "make a tokenizer.json of it: load the model with transformers' AutoTokenizer and call \
                   save_pretrained on it"
                .into(),
        }),
        None => Ok(()),
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
