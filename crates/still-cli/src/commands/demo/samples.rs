//! Short texts from teacher and student.

use std::ops::ControlFlow;

use still_attention::RowDtype;
use still_model::{GenerateOptions, Message, Model, generate};

use super::report::Sample;

const QUESTION: &str = "Why is the sky blue? Answer in two sentences.";
const MAX_NEW_TOKENS: usize = 48;

/// Asks one question, once greedily and once with sampling.
///
/// # Errors
/// If the model fails.
pub fn samples(name: &'static str, model: &Model, seed: u64) -> anyhow::Result<Vec<Sample>> {
    let ids = prompt(model)?;
    [0.0, 0.7].into_iter().map(|temperature| sample(name, model, &ids, temperature, seed)).collect()
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

fn sample(
    name: &'static str,
    model: &Model,
    ids: &[u32],
    temperature: f64,
    seed: u64,
) -> anyhow::Result<Sample> {
    let options = GenerateOptions {
        max_new_tokens: MAX_NEW_TOKENS,
        temperature,
        top_p: if temperature > 0.0 { 0.9 } else { 1.0 },
        seed,
        ..GenerateOptions::default()
    };
    let mut cache = model.new_cache(1, RowDtype::Bf16)?;
    let generation =
        generate(model, ids, &mut cache, &options, &mut |_| ControlFlow::Continue(()))?;
    Ok(Sample {
        model: name,
        prompt: QUESTION.into(),
        text: generation.text,
        sampling: match temperature {
            0.0 => "greedy".into(),
            _ => format!("temperature {temperature}, top-p 0.9, seed {seed}"),
        },
    })
}
