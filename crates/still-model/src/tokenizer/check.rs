//! What is looked at in a `tokenizer.json` before the library gets it: it trusts the file, and some files make it
//! allocate without end, or compute at random. What only makes it panic is [caught](super::guard).

use serde_json::Value;

/// Steps within steps; no tokenizer has more than two.
const DEPTH: usize = 8;
/// How many times longer a text may get on its way through all steps.
const GROWTH: f64 = 256.0;
/// Ids that no token has, beyond as many as there are tokens: the library iterates over all of them when it saves.
const SPARE_IDS: u64 = 1 << 16;

/// Whether the library can be given this.
pub(super) fn check(json: &Value) -> Result<(), String> {
    if !json.is_object() {
        return Err("it is no JSON object".into());
    }
    if !json["model"].is_object() {
        return Err("\"model\" is missing".into());
    }
    check_model(&json["model"], json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice))?;
    for (key, list) in [
        ("normalizer", "normalizers"),
        ("pre_tokenizer", "pretokenizers"),
        ("decoder", "decoders"),
        ("post_processor", "processors"),
    ] {
        let growth = growth_of(&json[key], list, 0)?;
        if growth > GROWTH {
            return Err(format!("\"{key}\" makes a text up to {growth:.0} times longer"));
        }
    }
    Ok(())
}

fn check_model(model: &Value, added: &[Value]) -> Result<(), String> {
    if let Some(dropout) = model["dropout"].as_f64().filter(|&dropout| dropout > 0.0) {
        return Err(format!(
            "model.dropout is {dropout}, with which a text has other tokens each time: set it to null"
        ));
    }
    let count = match &model["vocab"] {
        Value::Object(vocab) => {
            let ids = vocab.values().map(|id| id.as_u64().filter(|&id| id < u64::from(u32::MAX)));
            let largest = ids.into_iter().try_fold(0_u64, |most, id| Some(most.max(id?)));
            let largest = largest.ok_or("model.vocab has a value that is no token id")?;
            if largest >= 2 * (vocab.len() + added.len()) as u64 + SPARE_IDS {
                return Err(format!("model.vocab has id {largest}, but {} tokens", vocab.len()));
            }
            vocab.len()
        }
        Value::Array(vocab) => vocab.len(),
        _ => return Err("model.vocab is missing".into()),
    };
    if count == 0 {
        return Err("model.vocab is empty".into());
    }
    if let (Some(unknown), Value::Object(vocab)) = (model["unk_token"].as_str(), &model["vocab"])
        && !vocab.contains_key(unknown)
        && !added.iter().any(|token| token["content"] == unknown)
    {
        return Err(format!("model.unk_token \"{unknown}\" is no token"));
    }
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let merges = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    let right = |merge: &Value| match merge {
        Value::Array(pair) => pair.get(1).and_then(Value::as_str).map(str::to_owned),
        merge => merge.as_str().and_then(|pair| pair.split_once(' ')).map(|pair| pair.1.to_owned()),
    };
    if !prefix.is_empty()
        && let Some(bad) = merges.iter().filter_map(right).find(|right| !right.starts_with(prefix))
    {
        return Err(format!(
            "a merge continues a word with \"{bad}\", which lacks model.continuing_subword_prefix \"{prefix}\""
        ));
    }
    Ok(())
}

/// Goes through a step and the steps in it; by how much it can make a text longer.
fn growth_of(step: &Value, list: &str, depth: usize) -> Result<f64, String> {
    if depth > DEPTH {
        return Err(format!("\"{list}\" nests more than {DEPTH} deep"));
    }
    let kind = step["type"].as_str().unwrap_or_default();
    match kind {
        "Sequence" => {
            let steps = step[list].as_array().map_or(&[][..], Vec::as_slice);
            steps
                .iter()
                .try_fold(1.0, |growth, step| Ok(growth * growth_of(step, list, depth + 1)?))
        }
        "Prepend" => match step["prepend"].as_str() {
            Some("") => Err("Prepend with nothing to prepend".into()),
            // Before every stretch of text, however short.
            text => Ok(1.0 + text.map_or(0, str::len) as f64),
        },
        "Replace" => replaced(step),
        // A byte becomes a character of up to two.
        "ByteLevel" => Ok(2.0),
        "Metaspace" => Ok(3.0),
        "Precompiled" => {
            check_charsmap(step["precompiled_charsmap"].as_str().unwrap_or_default())?;
            Ok(4.0)
        }
        "FixedLength" if step["length"].as_u64() == Some(0) => Err("FixedLength of 0".into()),
        "TemplateProcessing" => check_template(step).map(|()| 1.0),
        _ => Ok(1.0),
    }
}

fn replaced(step: &Value) -> Result<f64, String> {
    let content = step["content"].as_str().map_or(0, str::len) as f64;
    match step["pattern"]["String"].as_str() {
        Some("") => Err("Replace of an empty text".into()),
        Some(pattern) => Ok((content / pattern.len() as f64).max(1.0)),
        // What a regular expression matches is some character, or the place between two.
        None => Ok(content.max(1.0)),
    }
}

/// The library allocates what the first four bytes ask for.
fn check_charsmap(base64: &str) -> Result<(), String> {
    let bytes = base64.trim_end_matches('=').len() as u64 * 3 / 4;
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let bits =
        base64.bytes().take(6).try_fold(0_u64, |bits, c| Some(bits << 6 | u64::from(digit(c)?)));
    let trie = bits.filter(|_| base64.len() >= 6).map(|bits| u32::swap_bytes((bits >> 4) as u32));
    match trie {
        Some(trie) if u64::from(trie) + 4 <= bytes && trie >= 4 => Ok(()),
        _ => Err("precompiled_charsmap is not one: it is too short for what it announces".into()),
    }
}

/// The text of a document once, and a few tokens around it.
fn check_template(step: &Value) -> Result<(), String> {
    let single = step["single"].as_array().map_or(&[][..], Vec::as_slice);
    if single.iter().filter(|piece| piece.get("Sequence").is_some()).count() > 1 {
        return Err("TemplateProcessing repeats the text".into());
    }
    let special = step["special_tokens"].as_object();
    let ids = |token: &Value| token["ids"].as_array().map_or(0, Vec::len);
    if single.len() > 64 || special.is_some_and(|all| all.values().any(|token| ids(token) > 64)) {
        return Err("TemplateProcessing puts more than 64 tokens around a text".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(key: &str, step: Value) -> Result<(), String> {
        check(&json!({ "model": { "vocab": { "a": 0 } }, key: step }))
    }

    #[test]
    fn steps_that_grow_a_text_without_end_are_refused() {
        let double = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
        let steps = |n| json!({ "type": "Sequence", "normalizers": vec![double.clone(); n] });
        assert_eq!(with("normalizer", steps(8)), Ok(()));
        assert!(with("normalizer", steps(40)).unwrap_err().contains("times longer"));
        let byte_level = vec![json!({ "type": "ByteLevel" }); 12];
        let step = json!({ "type": "Sequence", "pretokenizers": byte_level });
        assert!(with("pre_tokenizer", step).is_err());
        // Llama 2's.
        let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        let llama = json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, space] });
        assert_eq!(with("normalizer", llama), Ok(()));
    }

    #[test]
    fn a_charsmap_must_have_what_it_announces() {
        let step = |map: &str| json!({ "type": "Precompiled", "precompiled_charsmap": map });
        // A trie of 8 bytes and a text of one.
        assert_eq!(with("normalizer", step("CAAAAAAAAAAAAAAAAA==")), Ok(()));
        for bad in ["", "AA", "AAAAAA==", "/////wAAAAAAAAAA", "CAAAAAAA", "?AAAAAAAAAAAAAAAAA=="] {
            assert!(with("normalizer", step(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn models_that_compute_at_random_or_have_few_tokens_with_large_ids_are_refused() {
        let model = |model: Value| check(&json!({ "model": model }));
        assert!(model(json!({ "vocab": { "a": 0 }, "dropout": 0.1 })).is_err());
        assert_eq!(model(json!({ "vocab": { "a": 0 }, "dropout": null })), Ok(()));
        assert!(model(json!({ "vocab": { "a": 4_294_967_294_u32 } })).is_err());
        assert!(model(json!({ "vocab": { "a": -1 } })).is_err());
        assert!(model(json!({ "vocab": {} })).is_err());
        assert!(model(json!([])).is_err());
        let merges = json!([["a", "b"]]);
        let prefixed =
            json!({ "vocab": { "a": 0 }, "merges": merges, "continuing_subword_prefix": "##" });
        assert!(model(prefixed).is_err());
    }

    #[test]
    fn depth_and_templates_have_limits() {
        let nested = (0..20).fold(
            json!({ "type": "Fuse" }),
            |inner, _| json!({ "type": "Sequence", "decoders": [inner] }),
        );
        assert!(with("decoder", nested).is_err());
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let template = |n| json!({ "type": "TemplateProcessing", "single": vec![text.clone(); n] });
        assert_eq!(with("post_processor", template(1)), Ok(()));
        assert!(with("post_processor", template(2)).is_err());
    }
}
