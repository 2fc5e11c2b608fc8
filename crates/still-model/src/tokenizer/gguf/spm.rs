//! SentencePiece's BPE (`tokenizer.ggml.model` = `llama`): Llama 2, Mistral 7B, TinyLlama, Gemma.
//!
//! SentencePiece joins the two neighbors whose union is the piece with the best score, until no union is a piece. As
//! merges in the order of scores that is what the library does, and what transformers' converter writes.

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, NormalizerWrapper};

use super::Built;
use super::vocabulary::{Kind, Usual, Vocabulary};
use crate::error::{ModelError, Result};

const SCORES: &str = "tokenizer.ggml.scores";
/// What stands for a space.
const SPACE: &str = "▁";

pub(super) fn build(vocabulary: &Vocabulary<'_>) -> Result<Built> {
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocabulary.vocab(), merges(vocabulary)?)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = unknown(vocabulary)? {
        bpe = bpe.unk_token(unknown);
    }
    let bpe =
        bpe.build().map_err(|error| vocabulary.corrupt(format!("unusable pieces: {error}")))?;
    let mut inner = tokenizers::Tokenizer::new(bpe);

    let failed = |error: tokenizers::Error| ModelError::Tokenizer(error.to_string());
    // llama.cpp does so at the beginning and after each token that is matched whole, as the library does.
    let prefix = vocabulary.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(failed)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        normalizers.push(Prepend::new(SPACE.into()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(failed)?.into());
    inner.with_normalizer(Some(Normalizers::new(normalizers))).map_err(failed)?;
    inner.with_decoder(Some(Decoders::new(decoders)));
    let bos = Usual { id: Some(1), add: true };
    Ok(Built { inner, bos, eos: Usual { id: Some(2), add: false } })
}

/// The token of what is in no piece, where bytes have no tokens.
fn unknown(vocabulary: &Vocabulary<'_>) -> Result<Option<String>> {
    let of_kind = || {
        let id = vocabulary.kinds.iter().position(|kind| *kind == Kind::Unknown)?;
        Some(vocabulary.tokens[id].clone())
    };
    Ok(vocabulary.special("unknown")?.or_else(of_kind))
}

/// Every pair of pieces whose union is a piece, best first; equal ones in the order of transformers' converter.
fn merges(vocabulary: &Vocabulary<'_>) -> Result<Vec<(String, String)>> {
    let scores = scores(vocabulary)?;
    let pieces: HashMap<&str, (usize, f32)> = (0..scores.len())
        .filter(|&id| matches!(vocabulary.kinds[id], Kind::Normal | Kind::UserDefined))
        .map(|id| (vocabulary.tokens[id].as_str(), (id, scores[id])))
        .collect();
    check_order(vocabulary, &pieces)?;
    let mut merges = Vec::new();
    for (&piece, &(id, score)) in &pieces {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                merges.push((score, left.chars().count(), right.chars().count(), id, left, right));
            }
        }
    }
    merges.sort_unstable_by(|a, b| {
        b.0.total_cmp(&a.0).then_with(|| (b.1, b.2).cmp(&(a.1, a.2))).then_with(|| a.3.cmp(&b.3))
    });
    Ok(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

fn scores(vocabulary: &Vocabulary<'_>) -> Result<Vec<f32>> {
    let list = vocabulary.list(SCORES)?;
    if list.len() != vocabulary.tokens.len() {
        return Err(vocabulary.corrupt(format!(
            "{} tokens, but {} entries in {SCORES}",
            vocabulary.tokens.len(),
            list.len()
        )));
    }
    let score = |value: &candle_core::quantized::gguf_file::Value| {
        let score = value.to_f32().or_else(|_| value.to_i32().map(|score| score as f32));
        score.ok().filter(|score| !score.is_nan())
    };
    let scores = list.iter().map(score).collect::<Option<Vec<_>>>();
    scores.ok_or_else(|| vocabulary.corrupt(format!("{SCORES} has an entry that is no number")))
}

/// Some converters wrote the same score for all: then nothing says which pieces are joined first.
fn check_order(vocabulary: &Vocabulary<'_>, pieces: &HashMap<&str, (usize, f32)>) -> Result<()> {
    let mut long = pieces.iter().filter(|(piece, _)| piece.chars().nth(1).is_some());
    let Some((_, (_, first))) = long.next() else { return Ok(()) };
    let mut others = long.peekable();
    if others.peek().is_some() && others.all(|(_, (_, score))| score == first) {
        return Err(vocabulary.unsupported(
            format!("{SCORES} with the same score for every piece"),
            "convert the model again from its tokenizer.model, or use the safetensors checkpoint"
                .into(),
        ));
    }
    Ok(())
}
