//! Renders the cases of a file as `tests/data/make.py` writes them, and shows where the text is another than Python's.
//! `cargo run --release -p still-jinja --example check -- FILE…`

use std::time::SystemTime;

use serde_json::Value;
use still_jinja::Template;

fn main() {
    let (mut wrong, mut all) = (0, 0);
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let file: Value = serde_json::from_str(&text).expect("JSON");
        for case in file["cases"].as_array().into_iter().flatten() {
            let (source, expected) = (&case["template"], &case["expected"]);
            let variables = case["variables"].as_object().or(file["variables"].as_object());
            let variables = variables.cloned().unwrap_or_default();
            let rendered = Template::parse(source.as_str().unwrap_or_default())
                .and_then(|template| template.render(&variables, SystemTime::now()));
            let same = match (&rendered, expected.as_str()) {
                (Ok(rendered), Some(expected)) => rendered.text == expected,
                (Err(_), None) => true,
                _ => false,
            };
            all += 1;
            if !same {
                wrong += 1;
                let source: String =
                    source.as_str().unwrap_or_default().chars().take(300).collect();
                println!("--- {} {source}\n  expected {expected} {}", case["name"], case["error"]);
                match rendered {
                    Ok(rendered) => println!("  rendered {:?}", rendered.text),
                    Err(error) => println!("  error {error}"),
                }
            }
        }
    }
    println!("{wrong} of {all} differ");
}
