//! Damaged templates end with a text or an error: a few thousand of them, the same every time.

use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use still_jinja::Template;

/// A small generator (SplitMix64): what matters is that it is the same everywhere.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }
}

const PIECES: [&str; 40] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "-",
    "+",
    "{%-",
    "-%}",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "'",
    "\"",
    "|",
    ".",
    ",",
    ":",
    "not ",
    "is ",
    "in ",
    "if ",
    "for x in ",
    "else",
    "{% endif %}",
    "{% endfor %}",
    "{% raw %}",
    "loop",
    "messages",
    "999999999999999999",
    "-1",
    "1e308",
    "\\",
    "\u{0}",
    "é",
    " ** ",
];

#[test]
fn damaged_templates_never_panic_or_hang() {
    let file: Value = serde_json::from_str(include_str!("data/python.json")).unwrap();
    let variables = file["variables"].as_object().unwrap();
    let sources: Vec<&str> = file["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["template"].as_str().unwrap())
        .collect();
    let mut chance = Chance(7);
    let (mut rendered, mut refused) = (0, 0);
    for _ in 0..4000 {
        let mut source: Vec<char> = sources[chance.below(sources.len())].chars().collect();
        for _ in 0..=chance.below(4) {
            let at = chance.below(source.len() + 1);
            let end = (at + chance.below(8)).min(source.len());
            match chance.below(4) {
                0 => drop(source.drain(at..end)),
                1 => drop(source.splice(at..at, PIECES[chance.below(PIECES.len())].chars())),
                2 => {
                    let copy = source[at..end].to_vec();
                    let to = chance.below(source.len() + 1);
                    drop(source.splice(to..to, copy));
                }
                _ => {
                    let other: Vec<char> = sources[chance.below(sources.len())].chars().collect();
                    drop(source.splice(at..end, other));
                }
            }
        }
        let source: String = source.into_iter().collect();
        let started = Instant::now();
        let result = Template::parse(&source)
            .and_then(|template| template.render(variables, SystemTime::UNIX_EPOCH));
        assert!(started.elapsed() < Duration::from_secs(10), "{source}");
        match result {
            Ok(_) => rendered += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(rendered > 500 && refused > 500, "{rendered} rendered, {refused} refused");
}
