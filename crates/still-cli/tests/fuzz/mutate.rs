//! Changes of files, by what they hold.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::{binary, json};

/// Changes a file's bytes; what it did.
pub fn mutate(bytes: &mut Vec<u8>, file: &str, rng: &mut ChaCha8Rng) -> String {
    // Whatever it holds, it may be damaged anywhere.
    if rng.random_ratio(1, 4) {
        return damage(bytes, rng);
    }
    let ends = |end: &str| file.ends_with(end);
    let done = if ends(".json") {
        of_json(bytes, rng)
    } else if ends(".jsonl") {
        of_lines(bytes, rng)
    } else if ends(".toml") {
        of_toml(bytes, file, rng)
    } else if ends(".safetensors") || ends(".bin") {
        binary::safetensors(bytes, rng)
    } else if ends(".gguf") {
        binary::gguf(bytes, rng)
    } else if ends(".zst") {
        None
    } else {
        of_text(bytes, rng)
    };
    done.unwrap_or_else(|| damage(bytes, rng))
}

fn of_json(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) -> Option<String> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    let done = json::mutate(&mut value, rng);
    *bytes = serde_json::to_vec(&value).ok()?;
    Some(done)
}

fn of_lines(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) -> Option<String> {
    let mut lines: Vec<Vec<u8>> = bytes.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    let n = rng.random_range(0..lines.len());
    let done = match rng.random_range(0..8) {
        0 => {
            let copy = lines[n].clone();
            lines.insert(n, copy);
            "a line twice".to_owned()
        }
        1 => {
            lines.remove(n);
            "a line left out".to_owned()
        }
        2 => {
            lines[n] = b"[".repeat(rng.random_range(1..100_000));
            "a line of brackets".to_owned()
        }
        3 => {
            lines.swap(0, n);
            "lines in another order".to_owned()
        }
        _ => {
            let mut value: Value = serde_json::from_slice(&lines[n]).ok()?;
            let done = json::mutate(&mut value, rng);
            lines[n] = serde_json::to_vec(&value).ok()?;
            done
        }
    };
    *bytes = lines.join(&b'\n');
    Some(format!("line {}: {done}", n + 1))
}

/// Values that recipes are tried with.
const TOML: [&str; 23] = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "9223372036854775807",
    "-9223372036854775808",
    "1e308",
    "-1e308",
    "1e-308",
    "nan",
    "inf",
    "-inf",
    "0.0",
    "\"\"",
    "\"x\"",
    "true",
    "[]",
    "{}",
    "[[]]",
    "[0, -1]",
    "\"none\"",
    "{ a = { b = { c = 1 } } }",
];
/// Those that may be in range and mean hours of work, for a run that is only planned.
const LONG: [&str; 6] = ["65536", "65537", "16777216", "2147483648", "1000000000000", "[9, 70000]"];

fn of_toml(bytes: &mut Vec<u8>, file: &str, rng: &mut ChaCha8Rng) -> Option<String> {
    let text = String::from_utf8(bytes.clone()).ok()?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let n = rng.random_range(0..lines.len().max(1));
    let line = lines.get(n)?.clone();
    let done = match (line.split_once('='), rng.random_range(0..10)) {
        (Some((key, _)), 0..7) => {
            let long = file.starts_with("plan") && rng.random();
            let value = if long { LONG.choose(rng)? } else { TOML.choose(rng)? };
            lines[n] = format!("{key}= {value}");
            lines[n].clone()
        }
        (Some((key, _)), 7) => {
            let depth = rng.random_range(1..50_000);
            lines[n] = format!("{key}= {}{}", "[".repeat(depth), "]".repeat(depth));
            format!("{key}= {depth} brackets")
        }
        (_, 8) => {
            let depth = rng.random_range(1..20_000);
            lines.insert(n, format!("{}b = 1", "a.".repeat(depth)));
            format!("a key of {depth} names")
        }
        _ => {
            lines.remove(n);
            format!("without {line}")
        }
    };
    *bytes = lines.join("\n").into_bytes();
    Some(done)
}

fn of_text(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) -> Option<String> {
    let at = rng.random_range(0..=bytes.len());
    let (done, piece): (&str, Vec<u8>) = match rng.random_range(0..6) {
        0 => ("NULs", vec![0; 1000]),
        1 => ("no UTF-8", vec![0xff; 3]),
        2 => ("a long word", b"x".repeat(300_000)),
        3 => ("white space", b" \t\r\n\x0b".repeat(20_000)),
        4 => (
            "odd characters",
            "\u{feff}\u{200b}é\u{301}🏴\u{e0067}\u{10ffff}".repeat(500).into_bytes(),
        ),
        _ => {
            bytes.clear();
            return Some("empty".into());
        }
    };
    bytes.splice(at..at, piece);
    Some(format!("{done} at {at}"))
}

/// Damage as disks and networks do it.
pub fn damage(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) -> String {
    if bytes.is_empty() {
        bytes.push(rng.random());
        return "a byte".into();
    }
    let at = rng.random_range(0..bytes.len());
    match rng.random_range(0..8) {
        0 | 1 => {
            let bit = rng.random_range(0..8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at}")
        }
        2 => {
            bytes.truncate(at);
            format!("cut at {at}")
        }
        3 => {
            let end = (at + rng.random_range(1..64)).min(bytes.len());
            bytes.drain(at..end);
            format!("without bytes {at} to {end}")
        }
        4 => {
            let from = rng.random_range(0..bytes.len());
            let piece = bytes[from..(from + 64).min(bytes.len())].to_vec();
            bytes.splice(at..at, piece);
            format!("bytes of {from} also at {at}")
        }
        5 => {
            let end = (at + rng.random_range(1..512)).min(bytes.len());
            let fill = *[0, 0xff, b' ', b'"'].choose(rng).unwrap();
            bytes[at..end].fill(fill);
            format!("bytes {at} to {end} are {fill}")
        }
        6 => {
            let number = binary::EXTREME.choose(rng).unwrap().to_le_bytes();
            let end = (at + 8).min(bytes.len());
            bytes[at..end].copy_from_slice(&number[..end - at]);
            format!("8 bytes at {at} are {number:?}")
        }
        _ => {
            let more: Vec<u8> = (0..rng.random_range(1..300)).map(|_| rng.random()).collect();
            bytes.extend(&more);
            format!("{} more bytes", more.len())
        }
    }
}
