//! Linearize one attention layer with the library: what stage 1 does, in thirty lines.
//!
//! `cargo run --release -p still-train --example linearize_layer`

use still_attention::{StillConfig, attention_forward, dense_attention};
use still_model::random::{random_model, tiny_config};
use still_model::{FeatureInit, Student};
use still_train::{AdamW, AdamWConfig, Result};

/// Trains the feature maps of a random model's first layer; prints the loss as it falls.
pub fn main() -> Result<()> {
    let model = random_model(tiny_config(), 0)?;
    let still = StillConfig::uniform(2, model.config().geometry(), 16, 2);
    let mut student = Student::init(still, model.config(), FeatureInit::Identity, 0)?;

    // The tensors to learn become variables.
    let mut learned = Vec::new();
    student = student.map_tensors(|name, tensor| {
        let var = candle_core::Var::from_tensor(tensor)?;
        learned.push((name.to_owned(), var.clone()));
        Ok(var.as_tensor().clone())
    })?;
    let mut optimizer =
        AdamW::new(AdamWConfig { lr: 0.03, ..AdamWConfig::default() }, learned, 30)?;

    // What the layer's softmax attention gives is the target.
    let ids: Vec<u32> = (0..256).map(|t| t * t % 256).collect();
    let (layer, rotation) = (&model.decoder.layers[0], model.decoder.rotation(0, 256)?);
    let inputs = layer.attention_inputs(&model.decoder.embed(&ids)?, &rotation, None)?;
    let target = dense_attention(&inputs.q, &inputs.k, &inputs.v, None)?;

    for step in 0..30 {
        let learner = &student.layers[0];
        let (rows, weights) = ([&inputs.q, &inputs.k, &inputs.v], &learner.attention);
        let (output, saved) = attention_forward(rows, None, weights, &learner.config, None, false)?;
        let error = (output.out - &target)?;
        let loss = error.sqr()?.mean_all()?;
        let mut gradients = optimizer.gradients()?;
        saved.backward(&(&error * (2.0 / error.elem_count() as f64))?, &mut gradients)?;
        optimizer.step("transfer", gradients)?;
        if step % 10 == 0 || step == 29 {
            println!("step {step:2}: mean squared error {:.6}", loss.to_scalar::<f32>()?);
        }
    }
    Ok(())
}
