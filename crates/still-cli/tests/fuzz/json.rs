//! Changes of JSON that leave it JSON.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// Values that programs trip over.
pub fn extreme(rng: &mut ChaCha8Rng) -> Value {
    let text = |text: &str| Value::String(text.to_owned());
    let choices = [
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(1_u64 << 31),
        json!(u32::MAX),
        json!(1_u64 << 62),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1_000_000_000),
        json!(1e308),
        json!(-1e-308),
        json!(0.5),
        json!(-0.0),
        json!(1e12),
        Value::Null,
        json!(true),
        json!(false),
        text(""),
        text("NaN"),
        text("\u{0}"),
        text("\u{1b}[31m\u{7}"),
        text("ÿ\u{202e}\u{10ffff}"),
        text("../../../../etc/passwd"),
        text("."),
        text("/"),
        text("9999999999999999999999"),
        text(&"a".repeat(100_000)),
        json!([]),
        json!({}),
        json!([[[[[[[[[[]]]]]]]]]]),
        json!([-1, 1_u64 << 40]),
        json!({"": null}),
        json!(vec![0; 5000]),
    ];
    choices.choose(rng).unwrap().clone()
}

/// Changes one place of a document; what it did.
pub fn mutate(root: &mut Value, rng: &mut ChaCha8Rng) -> String {
    let mut paths = Vec::new();
    collect(root, &mut Vec::new(), &mut paths);
    // Long lists (a vocabulary) must not drown the rest: near the root is as likely as far from it.
    let depth = paths.choose(rng).map_or(0, Vec::len);
    let depth = rng.random_range(0..=depth);
    let near: Vec<&Vec<String>> = paths.iter().filter(|path| path.len() == depth).collect();
    let path = near.choose(rng).map_or_else(Vec::new, |path| (*path).clone());
    let place = if path.is_empty() { "/".to_owned() } else { path.join("/") };
    let place: String = place.chars().take(80).collect();
    let Some(at) = path.iter().try_fold(&mut *root, |at, step| match at {
        Value::Object(map) => map.get_mut(step),
        Value::Array(list) => list.get_mut(step.parse::<usize>().ok()?),
        _ => None,
    }) else {
        return "nothing".into();
    };
    match rng.random_range(0..10) {
        0..4 => {
            *at = extreme(rng);
            let shown: String = at.to_string().chars().take(60).collect();
            format!("{place} = {shown}")
        }
        4 => {
            let mut deep = at.take();
            for _ in 0..rng.random_range(1..120) {
                deep = if rng.random() { json!([deep]) } else { json!({ "a": deep }) };
            }
            *at = deep;
            format!("{place} wrapped")
        }
        5 => match at {
            Value::Object(map) if !map.is_empty() => {
                let key = map.keys().nth(rng.random_range(0..map.len())).cloned().unwrap();
                map.shift_remove(&key);
                format!("{place} without {key}")
            }
            Value::Array(list) if !list.is_empty() => {
                list.remove(rng.random_range(0..list.len()));
                format!("{place} without an entry")
            }
            _ => {
                *at = Value::Null;
                format!("{place} = null")
            }
        },
        6 => match at {
            Value::Object(map) => {
                *map = renamed(map, rng);
                format!("{place} with other keys")
            }
            Value::Array(list) if !list.is_empty() => {
                let copy = list[rng.random_range(0..list.len())].clone();
                list.insert(rng.random_range(0..=list.len()), copy);
                format!("{place} with an entry twice")
            }
            _ => {
                *at = extreme(rng);
                format!("{place} = {}", at.to_string().chars().take(60).collect::<String>())
            }
        },
        7 => {
            // A number that is nearly right.
            if let Some(number) = at.as_i64() {
                let factor = *[-1, 2, 3, 1000].choose(rng).unwrap();
                *at = json!(number.wrapping_mul(factor).wrapping_add(rng.random_range(-1..=1)));
            } else if let Some(number) = at.as_f64() {
                *at = json!(number * -1e9);
            } else {
                *at = extreme(rng);
            }
            format!("{place} = {}", at.to_string().chars().take(60).collect::<String>())
        }
        8 => {
            // A value of elsewhere in the document.
            let other = paths.choose(rng).cloned().unwrap_or_default();
            let copy = other
                .iter()
                .try_fold(&*root, |at, step| match at {
                    Value::Object(map) => map.get(step),
                    Value::Array(list) => list.get(step.parse::<usize>().ok()?),
                    _ => None,
                })
                .cloned()
                .unwrap_or(Value::Null);
            if let Some(at) = root.pointer_mut(&pointer(&path)) {
                *at = copy;
            }
            format!("{place} = what {} is", other.join("/").chars().take(60).collect::<String>())
        }
        _ => {
            if let Value::String(text) = at {
                let cut = text.len() / 2;
                let cut = (0..=cut).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
                text.insert_str(
                    cut,
                    [
                        "{% for i in range(9999999) %}x{% endfor %}",
                        "{{ ",
                        "\u{0}",
                        "%n",
                        "\n",
                        "((((",
                    ]
                    .choose(rng)
                    .unwrap(),
                );
            } else {
                *at = extreme(rng);
            }
            format!("{place} changed")
        }
    }
}

fn pointer(path: &[String]) -> String {
    path.iter().map(|step| format!("/{}", step.replace('~', "~0").replace('/', "~1"))).collect()
}

fn renamed(map: &Map<String, Value>, rng: &mut ChaCha8Rng) -> Map<String, Value> {
    let chosen = rng.random_range(0..map.len().max(1));
    let rename = |(n, (key, value)): (usize, (&String, &Value))| {
        let key = if n == chosen { format!("{key}x") } else { key.clone() };
        (key, value.clone())
    };
    map.iter().enumerate().map(rename).collect()
}

fn collect(value: &Value, at: &mut Vec<String>, to: &mut Vec<Vec<String>>) {
    if to.len() > 5000 {
        return;
    }
    to.push(at.clone());
    let mut step = |key: String, value: &Value| {
        at.push(key);
        collect(value, at, to);
        at.pop();
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| step(key.clone(), value)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(n, value)| step(n.to_string(), value));
        }
        _ => {}
    }
}
