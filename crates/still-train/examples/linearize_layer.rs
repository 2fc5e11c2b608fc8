//! Linearize one attention layer with the library: what stage 1 does, in thirty lines.
//!
//! `cargo run --release -p still-train --example linearize_layer`

use still_attention::{StillConfig, dense_attention, hybrid_attention};
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
    let target = dense_attention(&inputs.q, &inputs.k, &inputs.v)?;

    for step in 0..30 {
        let learner = &student.layers[0];
        let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
        let out = hybrid_attention(q, k, v, &learner.attention, None, &learner.config, None)?.out;
        let loss = (out - &target)?.sqr()?.mean_all()?;
        let grads = loss.backward()?;
        let grads: Vec<_> =
            optimizer.parameters().iter().map(|(_, var)| grads.get(var).cloned()).collect();
        optimizer.step("transfer", &grads)?;
        if step % 10 == 0 || step == 29 {
            println!("step {step:2}: mean squared error {:.6}", loss.to_scalar::<f32>()?);
        }
    }
    Ok(())
}
