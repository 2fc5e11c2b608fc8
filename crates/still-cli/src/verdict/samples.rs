//! Short texts of teacher and student.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};
use still_model::{GenerateOptions, Message, Model, generate};

use super::usual_rows;

const QUESTION: &str = "Why is the sky blue? Answer in two sentences.";
const MAX_NEW_TOKENS: usize = 48;

/// A text that a model wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Which row's model wrote it.
    pub model: String,
    /// What it was asked.
    pub prompt: String,
    /// What it wrote.
    pub text: String,
    /// `greedy`, or the temperature and seed.
    pub sampling: String,
}

/// Asks one question, once greedily and once with sampling.
///
/// # Errors
/// If the model fails.
pub fn samples(name: &str, model: &Model, seed: u64) -> anyhow::Result<Vec<Sample>> {
    Ok(vec![greedy(name, model)?, sample(name, model, 0.7, seed)?])
}

/// Asks the question greedily.
///
/// # Errors
/// If the model fails.
pub fn greedy(name: &str, model: &Model) -> anyhow::Result<Sample> {
    sample(name, model, 0.0, 0)
}

fn prompt(model: &Model) -> anyhow::Result<Vec<u32>> {
    let tokenizer = &model.tokenizer;
    Ok(match tokenizer.chat_template() {
        Some(template) => {
            let message = Message::new("user", QUESTION);
            tokenizer.encode(&template.render(&[message], true)?, false)?
        }
        None => tokenizer.encode(QUESTION, true)?,
    })
}

fn sample(name: &str, model: &Model, temperature: f64, seed: u64) -> anyhow::Result<Sample> {
    let options = GenerateOptions {
        max_new_tokens: MAX_NEW_TOKENS,
        temperature,
        top_p: if temperature > 0.0 { 0.9 } else { 1.0 },
        seed,
        ..GenerateOptions::default()
    };
    let ids = prompt(model)?;
    let mut cache = model.new_cache(1, usual_rows(model))?;
    let generation =
        generate(model, &ids, &mut cache, &options, &mut |_| ControlFlow::Continue(()))?;
    Ok(Sample {
        model: name.into(),
        prompt: QUESTION.into(),
        text: generation.text,
        sampling: match temperature {
            0.0 => "greedy".into(),
            _ => format!("temperature {temperature}, top-p 0.9, seed {seed}"),
        },
    })
}
