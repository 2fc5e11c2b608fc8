//! The example runs.

use still_model::random::{random_model, tiny_config};

#[expect(dead_code, reason = "its `main` reads the command line")]
#[path = "../../examples/generate.rs"]
mod generate;

#[test]
fn generate_writes_what_the_model_says() {
    let mut written = Vec::new();
    let model = random_model(tiny_config(), 0).unwrap();
    let text = generate::continue_text(&model, "The ship left on", &mut written).unwrap();
    assert!(!text.ids.is_empty());
    assert_eq!(String::from_utf8(written).unwrap(), text.text);
}
