//! Tokenizers that a GGUF file describes, read as llama.cpp reads them.

mod bpe;
mod end;
mod pre;
mod spm;
mod vocabulary;

use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use serde_json::{Value, json};
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::{Tokenizer, guard};
use crate::chat;
use crate::error::{ModelError, Result};
pub(crate) use end::end_of_generation;
use vocabulary::{Usual, Vocabulary};

/// A tokenizer before special tokens are added, and what its kind does where the file is silent.
struct Built {
    inner: tokenizers::Tokenizer,
    bos: Usual,
    eos: Usual,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`) or SentencePiece's BPE by scores (`llama`).
    ///
    /// # Errors
    /// A vocabulary of another kind, an unknown pre-tokenizer (both named), missing or contradictory entries.
    pub fn from_gguf(path: &Path, content: &Content) -> Result<Self> {
        let vocabulary = Vocabulary::read(path, content)?;
        let kind = vocabulary.text("tokenizer.ggml.model")?;
        let build = || match kind.as_deref() {
            Some("gpt2") => bpe::build(&vocabulary),
            Some("llama") => spm::build(&vocabulary),
            Some(other) => Err(vocabulary.unsupported(
                format!("tokenizer.ggml.model \"{other}\""),
                "known: gpt2 (byte-level BPE), llama (SentencePiece); use the safetensors \
                 checkpoint"
                    .into(),
            )),
            None => Err(vocabulary.missing("tokenizer.ggml.model")),
        };
        let Built { mut inner, bos, eos } =
            guard::catch(build).map_err(|reason| ModelError::corrupt(path, reason))??;

        // One call for all: each rebuilds the search for them.
        let added: Vec<AddedToken> = vocabulary.matched_whole().collect();
        guard::catch(|| inner.add_tokens(added).map_err(|error| error.to_string()))
            .and_then(|added| added)
            .map_err(|reason| ModelError::corrupt(path, reason))?;

        let mut config = json!({});
        let mut around = Vec::new();
        for (which, usual) in [("bos", bos), ("eos", eos)] {
            let (token, add) = vocabulary.around(which, usual)?;
            config[format!("{which}_token")] = json!(token);
            config[format!("add_{which}_token")] = json!(add);
            around.push(token.filter(|_| add));
        }
        if around.iter().any(Option::is_some) {
            let template = document_template(&vocabulary, &around[0], &around[1]);
            let template: PostProcessorWrapper = serde_json::from_value(template)
                .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
            inner.with_post_processor(Some(template));
        }
        let text = |key: &str| content.metadata.get(key).and_then(|v| v.to_string().ok().cloned());
        let names = content.metadata.get("tokenizer.chat_templates").and_then(|v| v.to_vec().ok());
        let names = names.into_iter().flatten().filter_map(|name| name.to_string().ok().cloned());
        chat::add_gguf_templates(&mut config, names, &text);
        let chat_template = chat::template_in(&config, Some(path.display().to_string()))?;
        Ok(Self::assemble(inner, chat_template, config, Some(path)))
    }
}

/// Puts tokens around a document, as JSON: the library's own notation cannot spell every token.
fn document_template(
    vocabulary: &Vocabulary<'_>,
    bos: &Option<String>,
    eos: &Option<String>,
) -> Value {
    let special = |token: &Option<String>| {
        token.as_ref().map(|token| json!({ "SpecialToken": { "id": token, "type_id": 0 } }))
    };
    let text = |which: &str| json!({ "Sequence": { "id": which, "type_id": 0 } });
    let around = |which| {
        [special(bos), Some(text(which)), special(eos)].into_iter().flatten().collect::<Vec<_>>()
    };
    let tokens: serde_json::Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|token| {
            let ids = [vocabulary.id(token)];
            (token.clone(), json!({ "id": token, "ids": ids, "tokens": [token] }))
        })
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": ([around("A"), around("B")].concat()),
        "special_tokens": tokens,
    })
}
