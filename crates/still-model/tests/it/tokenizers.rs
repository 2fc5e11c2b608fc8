//! Tokenizers: ids as llama.cpp and the models' own tokenizers give them, streams that equal whole texts, and what is
//! refused. `data/tokenizers` is written by `scripts/check_tokenizers.py --fixtures`: real vocabularies, reduced.

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content, Value};
use serde::Deserialize;
use still_model::{ModelError, Result, Tokenizer};

#[derive(Deserialize)]
struct Fixture {
    name: String,
    model: String,
    pre: Option<String>,
    tokens: Vec<String>,
    kinds: Vec<i32>,
    merges: Option<Vec<String>>,
    scores: Option<Vec<f32>>,
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    flags: std::collections::BTreeMap<String, bool>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    special: Vec<u32>,
}

/// A metadata key without `tokenizer.ggml.` and its value.
type Entry = (String, Value);

impl Fixture {
    fn read(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizers");
        let text = std::fs::read_to_string(dir.join(format!("{name}.json"))).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn entries(&self) -> Vec<Entry> {
        let texts = |all: &[String]| Value::Array(all.iter().cloned().map(Value::String).collect());
        let mut entries: Vec<Entry> = vec![
            ("model".into(), Value::String(self.model.clone())),
            ("tokens".into(), texts(&self.tokens)),
            (
                "token_type".into(),
                Value::Array(self.kinds.iter().copied().map(Value::I32).collect()),
            ),
        ];
        let mut add = |key: &str, value: Option<Value>| {
            entries.extend(value.map(|value| (key.to_owned(), value)));
        };
        add("pre", self.pre.clone().map(Value::String));
        add("merges", self.merges.as_deref().map(texts));
        let scores = |all: &Vec<f32>| Value::Array(all.iter().copied().map(Value::F32).collect());
        add("scores", self.scores.as_ref().map(scores));
        add("bos_token_id", self.bos.map(Value::U32));
        add("eos_token_id", self.eos.map(Value::U32));
        add("unknown_token_id", self.unk.map(Value::U32));
        for (flag, on) in &self.flags {
            add(flag, Some(Value::Bool(*on)));
        }
        entries
    }

    fn tokenizer(&self) -> Tokenizer {
        load(&self.entries()).unwrap()
    }
}

fn load(entries: &[Entry]) -> Result<Tokenizer> {
    let keyed: Vec<_> =
        entries.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    let metadata: Vec<_> = keyed.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &[]).unwrap();
    file.set_position(0);
    Tokenizer::from_gguf(Path::new("model.gguf"), &Content::read(&mut file).unwrap())
}

/// The fixture's entries with one set anew, or removed.
fn with(fixture: &Fixture, key: &str, value: Option<Value>) -> Vec<Entry> {
    let mut entries = fixture.entries();
    entries.retain(|(name, _)| name != key);
    entries.extend(value.map(|value| (key.to_owned(), value)));
    entries
}

const KINDS: [&str; 9] = [
    "llama-bpe",
    "qwen2",
    "deepseek-v3",
    "gpt-4o",
    "tekken",
    "llama-2",
    "gemma-3",
    "mistral-v1",
    "mistral-v3",
];

#[test]
fn every_kind_gives_the_ids_of_llama_cpp_and_of_its_own_tokenizer() {
    for name in KINDS {
        let fixture = Fixture::read(name);
        assert_eq!(fixture.name, name);
        let tokenizer = fixture.tokenizer();
        // What is saved with a student is the same tokenizer.
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let saved = Tokenizer::from_hf_dir(dir.path()).unwrap();
        assert!(fixture.cases.len() > 40);
        for Case { text, ids, special } in &fixture.cases {
            for tokenizer in [&tokenizer, &saved] {
                assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{name}: {text:?}");
                assert_eq!(&tokenizer.encode(text, true).unwrap(), special, "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn texts_come_back_as_they_were() {
    for name in KINDS {
        let fixture = Fixture::read(name);
        let tokenizer = fixture.tokenizer();
        for Case { text, ids, .. } in &fixture.cases {
            // A composed or replaced character, or a "▁" of the text itself, does not come back.
            if text.contains('▁')
                || (name == "qwen2" && text.contains(['\u{301}', '\u{212b}', '\u{212a}']))
            {
                continue;
            }
            let decoded = tokenizer.decode(ids, false).unwrap();
            let specials = ids.iter().any(|id| matches!(fixture.kinds[*id as usize], 3 | 4));
            // SentencePiece puts a space after a special token, too.
            if !(specials && fixture.model == "llama") {
                assert_eq!(&decoded, text, "{name}");
            }
        }
    }
}

#[test]
fn what_is_put_around_a_document_is_said_by_flags_and_by_kind() {
    let length = |entries: &[Entry]| load(entries).unwrap().encode("a", true).unwrap().len();
    let flag = |on| Some(Value::Bool(on));
    let llama3 = Fixture::read("llama-bpe");
    assert_eq!(length(&llama3.entries()), 2);
    assert_eq!(length(&with(&llama3, "add_bos_token", flag(false))), 1);
    assert_eq!(length(&with(&llama3, "add_eos_token", flag(true))), 3);
    // A default needs its token; a flag that asks for one that is missing is an error.
    assert_eq!(length(&with(&llama3, "bos_token_id", None)), 1);
    let mut lost = with(&llama3, "bos_token_id", None);
    lost.push(("add_bos_token".into(), Value::Bool(true)));
    assert!(corrupt(load(&lost)).contains("bos_token_id is missing"));
    let far = with(&llama3, "eos_token_id", Some(Value::U32(1 << 20)));
    assert!(corrupt(load(&far)).contains("eos_token_id is 1048576"));

    let qwen = Fixture::read("qwen2");
    assert_eq!(length(&with(&qwen, "add_bos_token", None)), 1);
    let tekken = Fixture::read("tekken");
    assert_eq!(length(&tekken.entries()), 2);
    // SentencePiece's ids are 1 and 2 where nothing is said.
    let llama2 = Fixture::read("llama-2");
    let whole = load(&with(&llama2, "bos_token_id", None)).unwrap().encode("a", true).unwrap();
    assert_eq!((whole.len(), whole[0]), (2, 1));
    assert_eq!(length(&with(&llama2, "add_bos_token", flag(false))), 1);
}

#[test]
fn a_space_before_a_text_is_added_only_where_the_file_wants_it() {
    let llama2 = Fixture::read("llama-2");
    let plain = load(&with(&llama2, "add_space_prefix", Some(Value::Bool(false)))).unwrap();
    let usual = llama2.tokenizer();
    assert_eq!(plain.encode(" x", false).unwrap(), usual.encode("x", false).unwrap());
    let ids = plain.encode(" x", false).unwrap();
    assert_eq!(plain.decode(&ids, false).unwrap(), " x");
    assert_eq!(usual.decode(&ids, false).unwrap(), "x");
}

#[test]
fn tokens_that_end_a_turn_are_special_whatever_the_converter_wrote() {
    let mut fixture = Fixture::read("qwen2");
    let end = fixture.tokens.iter().position(|token| token == "<|im_end|>").unwrap();
    fixture.kinds[end] = 1;
    let tokenizer = fixture.tokenizer();
    assert_eq!(tokenizer.encode("<|im_end|>", false).unwrap(), [end as u32]);
    assert_eq!(tokenizer.decode(&[end as u32], true).unwrap(), "");
}

#[test]
fn what_a_gguf_vocabulary_contradicts_is_an_error() {
    let llama3 = Fixture::read("llama-bpe");
    let pre = load(&with(&llama3, "pre", Some(Value::String("marvin".into()))));
    let ModelError::Unsupported { what, hint, .. } = pre.unwrap_err() else {
        panic!("not unsupported")
    };
    assert_eq!(what, "tokenizer.ggml.pre \"marvin\"");
    assert!(hint.contains("llama-bpe") && hint.contains("qwen2") && hint.contains("tekken"));
    let kind = load(&with(&llama3, "model", Some(Value::String("t5".into()))));
    assert!(matches!(kind, Err(ModelError::Unsupported { .. })));
    // Without a name, as llama.cpp's default.
    assert!(load(&with(&llama3, "pre", None)).is_ok());

    for key in ["tokens", "token_type", "merges", "model"] {
        assert!(corrupt(load(&with(&llama3, key, None))).contains(key), "{key}");
        let number = load(&with(&llama3, key, Some(Value::U32(3))));
        assert!(corrupt(number).contains(key), "{key}");
    }
    let twice = Value::Array(vec![Value::String("a".into()); 2]);
    let mut entries = with(&llama3, "tokens", Some(twice));
    entries.retain(|(key, _)| key != "token_type");
    assert!(corrupt(load(&entries)).contains("two ids, 0 and 1"));

    let llama2 = Fixture::read("llama-2");
    let count = llama2.tokens.len();
    let scores = |score: f32, count| Some(Value::Array(vec![Value::F32(score); count]));
    assert!(corrupt(load(&with(&llama2, "scores", scores(1.0, 3)))).contains("3 entries"));
    assert!(corrupt(load(&with(&llama2, "scores", scores(f32::NAN, count)))).contains("no number"));
    let equal = load(&with(&llama2, "scores", scores(-1000.0, count)));
    assert!(matches!(equal, Err(ModelError::Unsupported { .. })), "{equal:?}");
}

/// 256,000 pieces are read in seconds, and a long text takes time in proportion.
#[test]
fn large_vocabularies_and_long_texts_take_seconds() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let first = tokens.len();
    tokens.push("▁".into());
    tokens.extend(('a'..='z').map(String::from));
    let letters = "etaoinshrdlucmfwypvbgkjqxz";
    'all: for a in letters.chars() {
        for b in letters.chars() {
            tokens.push(format!("{a}{b}"));
            for c in letters.chars() {
                tokens.push(format!("{a}{b}{c}"));
                for d in letters.chars().take(14) {
                    tokens.push(format!("{a}{b}{c}{d}"));
                    if tokens.len() == 256_000 {
                        break 'all;
                    }
                }
            }
        }
    }
    let kinds = (0..tokens.len()).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        id if id < first => 6,
        _ => 1,
    });
    let kinds = Value::Array(kinds.map(Value::I32).collect());
    let scores = Value::Array((0..tokens.len()).map(|id| Value::F32(-(id as f32))).collect());
    let tokens = Value::Array(tokens.into_iter().map(Value::String).collect());
    let model = Value::String("llama".into());
    let entries: Vec<Entry> =
        [("model", model), ("tokens", tokens), ("token_type", kinds), ("scores", scores)]
            .map(|(key, value)| (key.to_owned(), value))
            .into();
    let start = std::time::Instant::now();
    let tokenizer = load(&entries).unwrap();
    let ids = tokenizer.encode(&"there is another one ".repeat(20_000), false).unwrap();
    assert!(ids.len() > 100_000);
    let seconds = start.elapsed().as_secs_f64();
    assert!(seconds < 60.0, "{seconds} s");
}

fn corrupt(result: Result<Tokenizer>) -> String {
    match result {
        Err(ModelError::Corrupt { path, reason, .. }) => {
            assert_eq!(path, Path::new("model.gguf"));
            reason
        }
        other => panic!("{other:?} is not a corrupt file"),
    }
}
