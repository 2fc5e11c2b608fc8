//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`): Llama 3, Qwen, Mistral's tekken, SmolLM, DeepSeek, GPT-2.

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::sequence::Sequence;

use super::vocabulary::{Usual, Vocabulary};
use super::{Built, pre};
use crate::error::{ModelError, Result};

const MERGES: &str = "tokenizer.ggml.merges";

pub(super) fn build(vocabulary: &Vocabulary<'_>) -> Result<Built> {
    let name = vocabulary.text("tokenizer.ggml.pre")?;
    let pre = pre::find(vocabulary, name.as_deref())?;
    let merges = vocabulary
        .list(MERGES)?
        .iter()
        .map(|value| {
            let pair = value.to_string().ok().and_then(|merge| split(merge));
            let (left, right) = pair.ok_or_else(|| {
                vocabulary.corrupt(format!("{MERGES} has an entry that is no pair of tokens"))
            })?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<Vec<_>>>()?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.vocab(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| vocabulary.corrupt(format!("unusable merges: {error}")))?;
    let failed = |error: tokenizers::Error| ModelError::Tokenizer(error.to_string());
    let mut inner = tokenizers::Tokenizer::new(bpe);
    if pre.nfc {
        inner.with_normalizer(Some(NFC)).map_err(failed)?;
    }
    let steps = pre.steps().map_err(failed)?;
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    inner.with_decoder(Some(ByteLevel::default()));
    let bos = Usual { id: None, add: pre.add_bos };
    Ok(Built { inner, bos, eos: Usual::default() })
}

/// The two tokens of a merge; the first may itself begin with a space.
fn split(merge: &str) -> Option<(&str, &str)> {
    let space = merge.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
    Some((&merge[..space], &merge[space + 1..]))
}
