//! Streams: what comes piece by piece is the whole text, whatever the decoder, in time that grows with the number of ids.

use std::path::Path;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use still_model::Tokenizer;

const SPACE: &str = "▁";

fn from_json(model: Value, decoder: Value, special: &[&str]) -> Tokenizer {
    let count = model["vocab"]
        .as_object()
        .map_or_else(|| model["vocab"].as_array().unwrap().len(), serde_json::Map::len);
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(n, text)| {
            json!({ "id": count + n, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    let json =
        json!({ "version": "1.0", "added_tokens": added, "decoder": decoder, "model": model });
    Tokenizer::from_json(json.to_string().as_bytes(), json!({}), Path::new("tokenizer.json"))
        .unwrap()
}

fn vocab(tokens: impl IntoIterator<Item = impl Into<String>>) -> Value {
    let tokens = tokens.into_iter().enumerate().map(|(id, token)| (token.into(), json!(id)));
    Value::Object(tokens.collect())
}

fn bpe(vocab: Value) -> Value {
    json!({ "type": "BPE", "vocab": vocab, "merges": [] })
}

/// Every byte, and pieces that begin with a space or do not.
fn sentencepiece_tokens() -> Vec<String> {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    tokens.extend(
        ["▁", "▁▁", "▁the", "cat", "▁und", "é", "你", "▁🙂", "<0x41", "\u{FFFD}", "a▁b"]
            .map(str::to_owned),
    );
    tokens
}

fn sentencepiece(strip: bool) -> Tokenizer {
    let replace = json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " });
    let mut decoders = vec![replace, json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if strip {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let decoder = json!({ "type": "Sequence", "decoders": decoders });
    from_json(bpe(vocab(sentencepiece_tokens())), decoder, &["<s>", "</s>"])
}

/// Bytes by GPT-2's alphabet, one a token, and two words.
fn byte_level() -> Tokenizer {
    let spelled = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        byte => {
            let before =
                (0..byte).filter(|b| !matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff));
            char::from_u32(256 + before.count() as u32).unwrap()
        }
    };
    let mut tokens: Vec<String> = (0..=255).map(|byte| spelled(byte).to_string()).collect();
    let word = |text: &str| text.bytes().map(spelled).collect::<String>();
    tokens.extend([word(" the"), word("你"), word("🙂 é"), word("\u{FFFD}")]);
    from_json(
        bpe(vocab(tokens)),
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false }),
        &["<|end|>"],
    )
}

fn kinds() -> Vec<(&'static str, Tokenizer)> {
    let words = ["a", "##b", "don", "##'t", ".", "ü", "[UNK]"];
    let word_piece = json!({ "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                             "max_input_chars_per_word": 100, "vocab": vocab(words) });
    let unigram: Vec<Value> = ["<unk>", "▁", "▁a", "b", "▁▁", "你"]
        .iter()
        .enumerate()
        .map(|(n, t)| json!([t, -(n as f64)]))
        .collect();
    let metaspace = json!({ "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": true });
    let suffixed = bpe(vocab(["a</w>", "b", "c</w>", "é"]));
    let sounds = bpe(vocab(["<pad>", "a", "b", "|"]));
    let ctc = json!({ "type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true });
    vec![
        ("SentencePiece", sentencepiece(true)),
        ("SentencePiece without a prefix", sentencepiece(false)),
        ("byte level", byte_level()),
        (
            "WordPiece",
            from_json(
                word_piece,
                json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
                &["[SEP]"],
            ),
        ),
        (
            "Unigram",
            from_json(
                json!({ "type": "Unigram", "unk_id": 0, "vocab": unigram }),
                metaspace,
                &["</s>"],
            ),
        ),
        (
            "BPE with a suffix",
            from_json(suffixed, json!({ "type": "BPEDecoder", "suffix": "</w>" }), &[]),
        ),
        ("CTC", from_json(sounds, ctc, &[])),
        ("no decoder", from_json(bpe(vocab(["a", "b", "你"])), Value::Null, &["<s>"])),
    ]
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let pieces = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect::<String>();
    pieces + &stream.finish().unwrap().unwrap_or_default()
}

#[test]
fn pieces_make_the_whole_text() {
    let mut rng = ChaCha8Rng::seed_from_u64(18);
    for (name, tokenizer) in kinds() {
        // Two ids beyond the vocabulary.
        let ids = tokenizer.vocab_size() as u32 + 2;
        for round in 0..400 {
            let length = rng.random_range(0..120);
            // A few ids often, or all alike; runs of bytes are seldom valid by chance.
            let some: Vec<u32> =
                (0..rng.random_range(1..6)).map(|_| rng.random_range(0..ids)).collect();
            let pick = |rng: &mut ChaCha8Rng| match round % 2 {
                0 => some[rng.random_range(0..some.len())],
                _ => rng.random_range(0..ids),
            };
            let ids: Vec<u32> = (0..length).map(|_| pick(&mut rng)).collect();
            let whole = tokenizer.decode(&ids, true).unwrap();
            assert_eq!(streamed(&tokenizer, &ids), whole, "{name}: {ids:?}");
        }
    }
}

#[test]
fn characters_in_bytes_make_the_whole_text() {
    let texts = ["🙂🙂 你好é", "क्षत्रिय", "\u{10ffff}\u{80}\u{7ff}\u{800}", "plain", "👩‍👩‍👧‍👦"];
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for tokenizer in [sentencepiece(true), byte_level()] {
        for _ in 0..300 {
            let mut bytes =
                texts[rng.random_range(0..texts.len())].repeat(rng.random_range(1..9)).into_bytes();
            match rng.random_range(0..4) {
                0 => bytes.truncate(rng.random_range(0..bytes.len())),
                1 => bytes[rng.random_range(0..24) % 5] = rng.random(),
                _ => {}
            }
            let mut ids: Vec<u32> = bytes.iter().map(|&byte| u32::from(byte)).collect();
            // Words and special tokens between the bytes.
            for _ in 0..rng.random_range(0..4) {
                ids.insert(
                    rng.random_range(0..=ids.len()),
                    rng.random_range(256..tokenizer.vocab_size() as u32),
                );
            }
            assert_eq!(
                streamed(&tokenizer, &ids),
                tokenizer.decode(&ids, true).unwrap(),
                "{ids:?}"
            );
        }
    }
}

/// A space is not lost where an old id is forgotten, and text comes with its token.
#[test]
fn spaces_stay_and_text_is_not_held_back() {
    let tokenizer = sentencepiece(true);
    let the = tokenizer.token_id("▁the").unwrap();
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(the).unwrap().as_deref(), Some("the"));
    for _ in 0..200 {
        assert_eq!(stream.push(the).unwrap().as_deref(), Some(" the"));
    }
    let tokenizer = byte_level();
    let mut stream = tokenizer.stream();
    let pieces: Vec<_> = "a🙂".bytes().map(|byte| stream.push(u32::from(byte)).unwrap()).collect();
    assert_eq!(pieces, [Some("a".into()), None, None, None, Some("🙂".into())]);
}

/// Also where no character is ever complete.
#[test]
fn time_grows_with_the_number_of_ids() {
    type IdAt = fn(usize) -> u32;
    let cases: [(&str, Tokenizer, IdAt); 6] = [
        ("invalid", byte_level(), |_| 0xff),
        ("never complete", byte_level(), |_| 0xf0),
        ("words", byte_level(), |_| 256),
        ("invalid fallback", sentencepiece(true), |_| 0xff),
        ("valid fallback", sentencepiece(true), |_| 0x61),
        ("words and bytes", sentencepiece(true), |n| if n % 2 == 0 { 0xe4 } else { 258 }),
    ];
    for (name, tokenizer, id) in cases {
        let time = |count: usize| {
            let ids: Vec<u32> = (0..count).map(id).collect();
            let run = || {
                let start = Instant::now();
                assert!(!streamed(&tokenizer, &ids).is_empty());
                start.elapsed()
            };
            (0..3).map(|_| run()).min().unwrap_or(Duration::MAX)
        };
        let (short, long) = (time(2_000), time(16_000));
        assert!(
            long < short * 24 + Duration::from_millis(50),
            "{name}: {short:?}, then {long:?} for eight times as many"
        );
    }
}
