//! `tokenizer.json` files that are damaged or made to hurt: errors that name the file, or fields without effect.

use std::path::Path;

use serde_json::{Value, json};
use still_model::{ModelError, Result, Tokenizer, panics_are_expected};

/// A sound one: letters and a space, and two merges.
fn sound() -> Value {
    let mut vocab: serde_json::Map<String, Value> = ('a'..='z')
        .chain(" .,!".chars())
        .enumerate()
        .map(|(id, letter)| (letter.to_string(), json!(id)))
        .collect();
    for piece in ["he", "hel", "<unk>"] {
        vocab.insert(piece.into(), json!(vocab.len()));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": [["h", "e"], ["he", "l"]] },
    })
}

fn with(key: &str, value: Value) -> Value {
    let mut json = sound();
    json[key] = value;
    json
}

fn with_model(key: &str, value: Value) -> Value {
    let mut json = sound();
    json["model"][key] = value;
    json
}

fn load(json: &Value) -> Result<Tokenizer> {
    load_bytes(json.to_string().as_bytes())
}

fn load_bytes(bytes: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_json(bytes, json!({}), Path::new("tokenizer.json"))
}

/// Loads and encodes quietly: an error names the file, a panic is none.
fn try_it(bytes: &[u8]) -> Result<()> {
    let result = load_bytes(bytes).and_then(|tokenizer| {
        let ids = tokenizer.encode("hello there.", true)?;
        tokenizer.decode(&ids, true)?;
        let mut stream = tokenizer.stream();
        ids.iter().try_for_each(|id| stream.push(*id).map(drop))?;
        stream.finish().map(drop)
    });
    if let Err(error) = &result {
        let ModelError::Corrupt { path, .. } = error else { panic!("{error:?} names no file") };
        assert_eq!(path, Path::new("tokenizer.json"));
        assert!(error.hint().is_some());
    }
    result
}

/// Panics that are caught are not told; any other still is.
fn quiet() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panics_are_expected() {
            hook(panic);
        }
    }));
}

#[test]
fn truncation_and_padding_have_no_effect() {
    let expected = load(&sound()).unwrap().encode("hello hello hello", true).unwrap();
    assert_eq!(expected.len(), 11);
    let truncation = |length: u64, stride: u64| json!({ "direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride });
    let padding = |length: Value| {
        json!({ "strategy": length, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "a" })
    };
    for (key, value) in [
        ("truncation", truncation(4, 0)),
        ("truncation", truncation(2, 9)),
        ("truncation", truncation(0, 0)),
        ("truncation", json!("nonsense")),
        ("padding", padding(json!("BatchLongest"))),
        ("padding", padding(json!({ "Fixed": 64 }))),
        ("padding", padding(json!({ "Fixed": 100_000_000_000_u64 }))),
    ] {
        let tokenizer = load(&with(key, value)).unwrap();
        assert_eq!(tokenizer.encode("hello hello hello", true).unwrap(), expected);
        assert!(tokenizer.to_json().unwrap().0.contains(&format!("\"{key}\":null")));
    }
}

#[test]
fn files_that_the_library_dies_of_are_errors() {
    quiet();
    let replace = |pattern: Value, content: &str| json!({ "type": "Replace", "pattern": pattern, "content": content });
    let grow = vec![replace(json!({ "String": "e" }), "eeee"); 30];
    let charsmap = |map: &str| json!({ "type": "Precompiled", "precompiled_charsmap": map });
    let cases = [
        ("no object", json!([])),
        ("no object", json!("tokenizer")),
        ("no model", json!({})),
        ("an empty pattern", with("normalizer", replace(json!({ "String": "" }), "x"))),
        ("an empty prefix", with("normalizer", json!({ "type": "Prepend", "prepend": "" }))),
        ("an empty charsmap", with("normalizer", charsmap(""))),
        ("a charsmap that asks for much", with("normalizer", charsmap("/////wAAAAAAAAAA"))),
        ("a charsmap of nonsense", with("normalizer", charsmap("CAAAAP////////8A"))),
        ("growth", with("normalizer", json!({ "type": "Sequence", "normalizers": grow.clone() }))),
        ("growth", with("decoder", json!({ "type": "Sequence", "decoders": grow }))),
        (
            "pieces of no length",
            with("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ),
        ("an unknown step", with("normalizer", json!({ "type": "Marvin" }))),
        ("an expression that is none", with("normalizer", replace(json!({ "Regex": "(" }), "x"))),
        ("dropout", with_model("dropout", json!(0.5))),
        ("a prefix that merges lack", with_model("continuing_subword_prefix", json!("####"))),
        ("no vocabulary", with_model("vocab", json!({}))),
        ("a negative id", with_model("vocab", json!({ "a": -1 }))),
        ("an id past all", with_model("vocab", json!({ "a": 4_294_967_295_u64 }))),
        ("a merge of nothing", with_model("merges", json!([["q", "no such token"]]))),
        ("a merge to no token", with_model("merges", json!([["h", "h"]]))),
        ("a merge longer than any token", with_model("merges", json!([["hel", "hel"]]))),
        ("no unknown token", with_model("unk_token", json!("missing"))),
        (
            "a decoder that cuts too much",
            with("decoder", json!({ "type": "Strip", "content": "o", "start": 0, "stop": 99 })),
        ),
    ];
    for (what, json) in cases {
        assert!(try_it(json.to_string().as_bytes()).is_err(), "{what}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(try_it(deep.as_bytes()).is_err());
    let nested = (0..60).fold(
        json!({ "type": "Lowercase" }),
        |inner, _| json!({ "type": "Sequence", "normalizers": [inner] }),
    );
    assert!(try_it(with("normalizer", nested).to_string().as_bytes()).is_err());
    for bytes in [&b""[..], b"{", b"\xff\xfe", b"null"] {
        assert!(try_it(bytes).is_err());
    }
}

/// Thousands of small damages: every one loads or is an error, none is a panic.
#[test]
fn damaged_files_load_or_are_errors() {
    quiet();
    let mut base = sound();
    base["normalizer"] = json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "a" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "." },
        { "type": "Strip", "strip_left": true, "strip_right": false },
    ] });
    base["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": "l+" }, "behavior": "Isolated", "invert": false },
        { "type": "Digits", "individual_digits": true },
        { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true },
    ] });
    base["decoder"] = json!({ "type": "Sequence", "decoders": [
        { "type": "ByteFallback" }, { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 1 },
    ] });
    base["post_processor"] = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "a", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "a": { "id": "a", "ids": [0], "tokens": ["a"] } } });
    let mut paths = Vec::new();
    leaves(&base, &mut Vec::new(), &mut paths);
    assert!(paths.len() > 80);
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1e300),
        json!(u64::MAX),
        json!(""),
        json!("▁"),
        json!("(?=x)*"),
        json!([]),
        json!({}),
        json!(true),
        json!("Sequence"),
        json!([[["x"]]]),
    ];
    let mut errors = 0;
    for path in &paths {
        for value in &values {
            let mut damaged = base.clone();
            *damaged.pointer_mut(path).unwrap() = value.clone();
            errors += usize::from(try_it(damaged.to_string().as_bytes()).is_err());
        }
    }
    assert!(errors > paths.len(), "{errors} of {} damages", paths.len() * values.len());
}

/// JSON pointers to all values.
fn leaves(value: &Value, path: &mut Vec<String>, found: &mut Vec<String>) {
    if !path.is_empty() {
        found.push(format!("/{}", path.join("/")));
    }
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(n, v)| (n.to_string(), v)).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        path.push(key.replace('~', "~0").replace('/', "~1"));
        leaves(child, path, found);
        path.pop();
    }
}

#[test]
fn what_is_around_a_document_is_the_post_processors_to_say() {
    let template = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "a", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "a": { "id": "a", "ids": [0], "tokens": ["a"] } } });
    let config =
        json!({ "add_bos_token": false, "bos_token": "a", "tokenizer_class": "LlamaTokenizer" });
    let path = Path::new("tokenizer.json");
    let bytes = with("post_processor", template).to_string();
    let tokenizer = Tokenizer::from_json(bytes.as_bytes(), config, path).unwrap();
    assert_eq!(tokenizer.encode("x", true).unwrap(), [0, 23]);
}

#[test]
fn other_forms_of_a_tokenizer_are_refused_by_name() {
    for name in ["tokenizer.model", "tekken.json", "vocab.json"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), "x").unwrap();
        let error = Tokenizer::from_hf_dir(dir.path()).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }));
        assert!(error.to_string().contains(name), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::from_hf_dir(dir.path()), Err(ModelError::Io { .. })));
}
