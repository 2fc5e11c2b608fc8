//! One layer of stage 2, forward and backward.

use candle_core::Tensor;
use still_compute::Gradients;
use still_model::{DecoderLayer, ModelError, Rotation, SavedActivations, SavingOps, StudentLayer};

use crate::error::Result;
use crate::recipe::Recompute;

/// One layer of stage 2 and its inputs.
pub(crate) struct LayerPass<'a> {
    pub decoder: &'a DecoderLayer,
    /// `None` for a layer that keeps its sliding window.
    pub student: Option<&'a StudentLayer>,
    pub rotation: &'a Rotation,
    pub recompute: Recompute,
    /// Whether the gradient of the input is needed, because a layer below learns.
    pub wants_input: bool,
}

/// What the forward pass of a layer saved for the backward pass.
pub(crate) enum Saved<'w> {
    /// The input, `[B, N, E]`. The backward pass recomputes the rest.
    Input(Tensor),
    /// All activations that the backward pass reads.
    Activations(Box<SavedActivations<'w>>),
}

impl<'w> LayerPass<'w> {
    /// Returns the output `[B, N, E]` of `x` `[B, N, E]`, without a graph, and what the backward pass needs.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Saved<'w>)> {
        let (y, saved) = self.pass(x)?;
        Ok(match self.recompute {
            Recompute::Layer => (y, Saved::Input(x.clone())),
            Recompute::Mlp | Recompute::Nothing => (y, Saved::Activations(Box::new(saved))),
        })
    }

    fn pass(&self, x: &Tensor) -> Result<(Tensor, SavedActivations<'w>)> {
        let Self { decoder, student, rotation, wants_input, .. } = *self;
        let saves_wide = self.recompute != Recompute::Mlp;
        let (mut ops, x) = SavingOps::new(x, wants_input, decoder.head_dim, rotation, saves_wide)?;
        let inputs = decoder.before_attention(&mut ops, &x, student)?;
        let out = match (student, decoder.sliding_window) {
            (Some(student), _) => ops.attend(&inputs, &student.attention, &student.config)?,
            (None, Some(window)) => ops.attend_sliding(&inputs, window, decoder.logit_scale)?,
            (None, None) => {
                let what = "a layer with full attention that no student has learned";
                return Err(ModelError::Invalid(what.into()).into());
            }
        };
        let y = decoder.after_attention(&mut ops, x, &out, student)?;
        Ok((ops.by_token(&y)?, ops.into_saved(&y)))
    }

    /// Returns the input's gradient from the output's, or `None` if it is not needed. Adds the gradients of learned tensors to
    /// `gradients`.
    pub fn backward(
        &self,
        saved: Saved<'w>,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let saved = match saved {
            Saved::Input(x) => self.pass(&x)?.1,
            Saved::Activations(activations) => *activations,
        };
        Ok(saved.backward(dy, gradients)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device, Var};
    use still_attention::hybrid_attention;
    use still_compute::{Spans, pull_back};
    use still_model::random::{random_model, tiny_config, tiny_sliding_config};
    use still_model::{Dropout, Model, ModelConfig, Student};
    use still_testing::{assert_relative_rms, uniform};

    use super::*;
    use crate::parameters::trainable;
    use crate::recipe::Recipe;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        uniform(shape, 1.0, seed).to_dtype(DType::F32).unwrap()
    }

    fn model(architecture: still_model::Architecture, biased: bool) -> Model {
        let config = ModelConfig {
            architecture,
            attention_bias: biased,
            attention_output_bias: biased,
            mlp_bias: biased,
            ..tiny_config()
        };
        random_model(config, 5).unwrap()
    }

    fn assert_close(got: &Tensor, expected: &Tensor, what: &str) {
        assert_eq!(got.dtype(), DType::F32, "{what}");
        assert_relative_rms(what, got, expected, 1e-4);
    }

    /// The layer in the tensor library's graph.
    fn graph(layer: &LayerPass<'_>, x: &Tensor) -> Tensor {
        let LayerPass { decoder, student, rotation, .. } = *layer;
        let inputs = decoder.attention_inputs(x, rotation, student).unwrap();
        let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
        let out = match student {
            Some(StudentLayer { attention, config, .. }) => {
                let gate = inputs.gate.as_ref();
                hybrid_attention(q, k, v, attention, gate, config, None).unwrap().out
            }
            None => decoder.softmax_attention(&inputs).unwrap(),
        };
        decoder.layer_output(x, &out, student).unwrap()
    }

    #[test]
    fn saved_activations_give_the_gradients_of_the_graph() {
        use still_model::Architecture::{Llama, Qwen3};
        for (architecture, wants_input, biased, gate, dropout) in [
            (Llama, true, false, false, false),
            (Llama, false, false, false, false),
            (Qwen3, true, false, false, false),
            (Llama, true, true, false, false),
            (Llama, true, false, true, false),
            (Llama, false, false, true, true),
            (Qwen3, true, true, true, true),
        ] {
            let model = model(architecture, biased);
            let gated = format!("attention.gate={gate}");
            let set = ["attention.chunk=8", "attention.budget=2", "attention.init=normal", &gated];
            let set: Vec<String> = set.map(str::to_owned).into();
            let recipe = Recipe::parse("", &set).unwrap();
            let still = recipe.attention.resolve(model.config()).unwrap();
            let init = recipe.attention.init;
            let mut student = Student::init(still, model.config(), init, 3).unwrap();
            student.add_lora(model.config(), recipe.finetune.lora.clone(), 4).unwrap();
            // Updates that are not zero: at B = 0 the gradient of A is.
            let mut n = 0.0;
            let moved = student.map_tensors(|_, tensor| {
                n += 1.0;
                Ok(tensor.affine(1.0, 0.01 * n)?)
            });
            let (mut student, parameters) =
                trainable(&moved.unwrap(), &Device::Cpu, |_| true).unwrap();
            if dropout {
                let dropout = Dropout { rate: 0.25, seed: 1, stream: 9 };
                let lora = student.layers[1].lora.as_ref().unwrap().with_dropout(dropout);
                student.layers[1].lora = Some(lora);
            }
            let spans = Arc::new(Spans::new(parameters.iter().map(|(_, var)| var.as_tensor())));
            let rotation = model.decoder.rotation(0, 45).unwrap();
            let width = model.config().hidden_size;
            let (x, dy) = (random(&[1, 45, width], 1), random(&[1, 45, width], 2));
            for recompute in [Recompute::Nothing, Recompute::Mlp, Recompute::Layer] {
                let layer = LayerPass {
                    decoder: &model.decoder.layers[1],
                    student: Some(&student.layers[1]),
                    rotation: &rotation,
                    recompute,
                    wants_input,
                };
                let what = format!(
                    "{architecture:?}, {recompute:?}, {wants_input}, {biased}, {gate}, {dropout}"
                );
                let input = Var::from_tensor(&x).unwrap();
                let expected = graph(&layer, &input);
                let mut expected_grads = pull_back(&expected, &dy).unwrap().backward().unwrap();
                let expected_dx = expected_grads.remove(&input).unwrap();
                let (y, saved) = layer.forward(&x).unwrap();
                assert_close(&y, &expected, &what);
                let mut grads = Gradients::new(&spans).unwrap();
                let dx = layer.backward(saved, &dy, &mut grads).unwrap();
                assert_eq!(dx.is_some(), wants_input);
                if let Some(dx) = dx {
                    assert_close(&dx, &expected_dx, &what);
                }
                let mut compared = 0;
                for (name, var) in &parameters {
                    let (got, expected) = (grads.get(var).unwrap(), expected_grads.get(var));
                    assert_eq!(got.is_some(), expected.is_some(), "{what}: {name}");
                    if let (Some(got), Some(expected)) = (got, expected) {
                        assert_close(&got, expected, &format!("{what}: {name}"));
                        compared += 1;
                    }
                }
                assert!(compared >= 11 + usize::from(gate), "{what}: {compared} gradients");
            }
        }
    }

    /// Layers of Gemma 3 with a window, which learn nothing but pass the gradient on, and with full attention; low-rank updates,
    /// without and with dropout, lie before the norms of what attention gives.
    #[test]
    fn sliding_layers_give_the_gradients_of_the_graph() {
        let rates = [None, Some(0.25), Some(0.6)].into_iter();
        rates.for_each(|rate| check_sliding_layers(tiny_sliding_config(), rate));
        let query_pre_attn_scalar = Some(20.0);
        let scaled = ModelConfig { query_pre_attn_scalar, ..tiny_sliding_config() };
        check_sliding_layers(scaled, Some(0.25));
    }

    fn check_sliding_layers(config: ModelConfig, rate: Option<f64>) {
        let model = random_model(config, 5).unwrap();
        let set = ["attention.chunk=8", "attention.budget=2", "attention.init=normal"];
        let recipe = Recipe::parse("", &set.map(str::to_owned)).unwrap();
        let still = recipe.attention.resolve(model.config()).unwrap();
        let mut student = Student::init(still, model.config(), recipe.attention.init, 3).unwrap();
        student.add_lora(model.config(), recipe.finetune.lora.clone(), 4).unwrap();
        // Updates that are not zero: at B = 0 the gradient of A is.
        let moved = student.map_tensors(|_, tensor| Ok(tensor.affine(1.0, 0.02)?)).unwrap();
        let (mut student, parameters) = trainable(&moved, &Device::Cpu, |_| true).unwrap();
        for layer in &mut student.layers {
            let dropout = rate.map(|rate| Dropout { rate, seed: 1, stream: 9 });
            let updates = layer.lora.as_ref().unwrap();
            layer.lora = Some(dropout.map_or(updates.clone(), |d| updates.with_dropout(d)));
        }
        let spans = Arc::new(Spans::new(parameters.iter().map(|(_, var)| var.as_tensor())));
        let rotation = model.decoder.rotation(0, 45).unwrap();
        let width = model.config().hidden_size;
        let (x, dy) = (random(&[1, 45, width], 1), random(&[1, 45, width], 2));
        for recompute in [Recompute::Nothing, Recompute::Mlp, Recompute::Layer] {
            for n in [3, 4] {
                let layer = LayerPass {
                    decoder: &model.decoder.layers[n],
                    student: student.layer(n),
                    rotation: &rotation,
                    recompute,
                    wants_input: true,
                };
                let what = format!("layer {n}, {recompute:?}, dropout {rate:?}");
                let input = Var::from_tensor(&x).unwrap();
                let expected = graph(&layer, &input);
                let mut expected_grads = pull_back(&expected, &dy).unwrap().backward().unwrap();
                let (y, saved) = layer.forward(&x).unwrap();
                assert_close(&y, &expected, &what);
                let mut grads = Gradients::new(&spans).unwrap();
                let dx = layer.backward(saved, &dy, &mut grads).unwrap();
                assert_close(&dx.unwrap(), &expected_grads.remove(&input).unwrap(), &what);
                let mut learned = 0;
                for (name, var) in &parameters {
                    if let Some(got) = grads.get(var).unwrap() {
                        let expected = expected_grads.get(var).unwrap();
                        assert_close(&got, expected, &format!("{what}: {name}"));
                        learned += 1;
                    }
                }
                // Two maps, a scale, and both matrices of four updates.
                assert_eq!(learned, if n == 4 { 3 + 8 } else { 0 }, "{what}");
            }
        }
    }
}
