//! A tiny model, a tiny recipe and fixed token ids.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;

use still_model::Model;
use still_model::random::{random_model, tiny_config};
use still_train::{Observer, Recipe, StepReport, Windows};

/// Asks to stop after so many steps.
pub struct StopAfter(pub usize);

impl Observer for StopAfter {
    fn on_step(&mut self, _report: &StepReport) {
        self.0 = self.0.saturating_sub(1);
    }

    fn stop_requested(&self) -> bool {
        self.0 == 0
    }
}

pub fn model() -> Model {
    random_model(tiny_config(), 11).unwrap()
}

/// Windows of 48 ids that repeat with a period, so that there is something to attend to.
pub fn windows() -> Windows {
    let window = |n: u32| (0..48).map(|t| (t * t + 7 * (t % 11) + 31 * n) % 256).collect();
    Windows::from_windows((0..6).map(window).collect(), 5)
}

pub fn recipe(overrides: &[&str]) -> Recipe {
    let text = r#"
        seed = 3
        [attention]
        chunk = 8
        budget = 1
        [data]
        length = 48
        min_length = 8
        [transfer]
        steps = 10
        batch = 2
        optimizer = { lr = 1e-2, warmup = 2 }
        [finetune]
        steps = 10
        batch = 2
        lora = { rank = 2, alpha = 4, targets = ["q", "k", "v", "o"] }
        optimizer = { lr = 3e-3, warmup = 2 }
        [checkpoint]
        every = 3
        keep = 3
    "#;
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    Recipe::parse(text, &overrides).unwrap()
}

/// Every learned value of a student, by its bits.
pub fn parameters(model: &Model) -> HashMap<String, Vec<u32>> {
    let mut all = HashMap::new();
    model
        .student
        .as_ref()
        .unwrap()
        .map_tensors(|name, tensor| {
            let bits =
                tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect();
            all.insert(name.to_owned(), bits);
            Ok(tensor.clone())
        })
        .unwrap();
    all
}
