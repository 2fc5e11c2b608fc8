//! Where templates are found: `tokenizer_config.json`, files of their own, GGUF metadata.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{ChatTemplate, DEFAULT};
use crate::error::{ModelError, Result};
use crate::files::read_if_there;

/// The file with the only or default template.
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The directory with the others, a file each.
pub(crate) const TEMPLATE_DIR: &str = "additional_chat_templates";
/// Roles of tokens that templates may name. What else a configuration calls a token is none of theirs.
const SPECIAL: [&str; 7] = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"];

/// Puts templates that lie in files of their own into the configuration, where they take precedence; returns the
/// file or directory that they are from.
///
/// # Errors
/// A file that is there and cannot be read.
pub(crate) fn read_template_files(dir: &Path, config: &mut Value) -> Result<Option<String>> {
    let mut named = Vec::new();
    let path = dir.join(TEMPLATE_FILE);
    if let Some(source) = read_if_there(&path)? {
        named.push((DEFAULT.to_owned(), source));
    }
    let others = dir.join(TEMPLATE_DIR);
    if others.is_dir() {
        let entries = std::fs::read_dir(&others).map_err(ModelError::read(&others))?;
        let mut files = entries
            .map(|entry| entry.map(|entry| entry.path()).map_err(ModelError::read(&others)))
            .collect::<Result<Vec<_>>>()?;
        files.retain(|file| file.extension().is_some_and(|extension| extension == "jinja"));
        files.sort_unstable();
        for file in files {
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let source = read_if_there(&file)?.unwrap_or_default();
            named.push((name, source));
        }
    }
    let origin = match &named[..] {
        [] => return Ok(None),
        [(name, source)] if name == DEFAULT => {
            config["chat_template"] = json!(source);
            path
        }
        several => {
            config["chat_template"] = to_json(several);
            dir.to_path_buf()
        }
    };
    Ok(Some(origin.display().to_string()))
}

/// As `tokenizer_config.json` has them.
fn to_json(named: &[(String, String)]) -> Value {
    match named {
        [(name, source)] if name == DEFAULT => json!(source),
        several => several
            .iter()
            .map(|(name, source)| json!({ "name": name, "template": source }))
            .collect(),
    }
}

/// The templates of `tokenizer_config.json`, with its special tokens; `origin` names the file in errors.
///
/// # Errors
/// `chat_template` of another type than transformers writes.
pub(crate) fn template_in(config: &Value, origin: Option<String>) -> Result<Option<ChatTemplate>> {
    let wrong = |what: &str| {
        let place = origin.as_ref().map(|file| format!(" (in {file})")).unwrap_or_default();
        ModelError::ChatTemplate(format!("{what}{place}"))
    };
    let named = match &config["chat_template"] {
        Value::Null => return Ok(None),
        Value::String(source) => vec![(DEFAULT.to_owned(), source.clone())],
        Value::Array(all) => {
            let entry = |entry: &Value| {
                let text = |key: &str| entry[key].as_str().map(str::to_owned);
                text("name").zip(text("template"))
            };
            let all: Option<Vec<_>> = all.iter().map(entry).collect();
            all.ok_or_else(|| wrong("a named template without a \"name\" and a \"template\""))?
        }
        Value::Object(all) => {
            let entry = |(name, source): (&String, &Value)| {
                Some((name.clone(), source.as_str()?.to_owned()))
            };
            let all: Option<Vec<_>> = all.iter().map(entry).collect();
            all.ok_or_else(|| wrong("a named template that is not text"))?
        }
        _ => return Err(wrong("\"chat_template\" is neither text nor a list of named ones")),
    };
    if named.is_empty() {
        return Ok(None);
    }
    Ok(Some(ChatTemplate::from_named(named, special(config), origin)))
}

/// Puts templates of GGUF metadata into a configuration: `tokenizer.chat_template` and, named by
/// `tokenizer.chat_templates`, `tokenizer.chat_template.NAME`.
pub(crate) fn add_gguf_templates(
    config: &mut Value,
    names: impl Iterator<Item = String>,
    text: &dyn Fn(&str) -> Option<String>,
) {
    let default = text("tokenizer.chat_template").map(|source| (DEFAULT.to_owned(), source));
    let more = names.filter(|name| name != DEFAULT).filter_map(|name| {
        let source = text(&format!("tokenizer.chat_template.{name}"))?;
        Some((name, source))
    });
    let named: Vec<_> = default.into_iter().chain(more).collect();
    if !named.is_empty() {
        config["chat_template"] = to_json(&named);
    }
}

/// Adds what `special_tokens_map.json` says to a configuration that does not list its added tokens: so old ones are, and
/// transformers reads that file for no others.
pub(crate) fn add_special_tokens(config: &mut Value, tokens: Value) {
    if config.get("added_tokens_decoder").is_some() {
        return;
    }
    for role in SPECIAL {
        let name = format!("{role}_token");
        if !tokens[&name].is_null() {
            config[name.as_str()] = tokens[&name].clone();
        }
    }
}

/// Special tokens, each given as a string or as an object.
fn special(config: &Value) -> Map<String, Value> {
    let token = |role: &&str| {
        let name = format!("{role}_token");
        let token = &config[&name];
        let text = token.as_str().or_else(|| token["content"].as_str())?;
        Some((name, json!(text)))
    };
    SPECIAL.iter().filter_map(token).collect()
}
