//! One layer of stage 2 on its way forward, and what its way back needs.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use still_attention::{AttentionWalk, hybrid_attention, walk_attention};
use still_compute::pull_back;
use still_model::{DecoderLayer, FinishWalk, InputsWalk, LoraLayer, Rotation, StudentLayer};

use crate::error::Result;
use crate::recipe::Recompute;

/// What the pass of one layer works on.
pub(crate) struct Layer<'a> {
    pub decoder: &'a DecoderLayer,
    pub student: &'a StudentLayer,
    pub rotation: &'a Rotation,
    pub recompute: Recompute,
    /// Whether something learned lies below, so that the gradient of the input is wanted.
    pub wants_input: bool,
}

/// A layer's pass as far as it is kept.
pub(crate) enum Tape {
    /// The input alone, `[B, N, E]`: the rest is computed again.
    Input(Tensor),
    /// Input and output in the tensor library's graph.
    Graph { input: Tensor, output: Tensor },
    /// Walked by hand.
    Walked(Box<Walked>),
}

pub(crate) struct Walked {
    inputs: InputsWalk,
    attention: AttentionWalk,
    finish: FinishWalk,
}

impl Layer<'_> {
    /// Whether the pass is walked by hand: on devices, where a graph's many small ops cost more than what they compute. Dropout
    /// and the output gate, whose gradient comes to the layer's norm by another way, go through the graph.
    fn is_walked(&self, x: &Tensor) -> bool {
        let drops = |lora: &LoraLayer| {
            [&lora.q, &lora.k, &lora.v, &lora.o]
                .into_iter()
                .flatten()
                .any(|lora| lora.dropout.is_some())
        };
        !x.device().is_cpu()
            && !self.student.config.gate
            && !self.student.lora.as_ref().is_some_and(drops)
    }

    /// The output `[B, N, E]` for `x` `[B, N, E]`, apart from any graph, and what the way back needs.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Tape)> {
        match self.recompute {
            // What is learned makes a graph all the same: it is dropped here.
            Recompute::Layer => Ok((self.pass(x)?.0, Tape::Input(x.clone()))),
            Recompute::Mlp | Recompute::Nothing => self.pass(x),
        }
    }

    fn pass(&self, x: &Tensor) -> Result<(Tensor, Tape)> {
        if self.is_walked(x) {
            let (y, walked) = self.walk(x)?;
            return Ok((y, Tape::Walked(Box::new(walked))));
        }
        let input = if self.wants_input { Var::from_tensor(x)?.into_inner() } else { x.clone() };
        let output = self.graph(&input)?;
        Ok((output.detach(), Tape::Graph { input, output }))
    }

    /// The layer by hand.
    pub fn walk(&self, x: &Tensor) -> Result<(Tensor, Walked)> {
        let Self { decoder, student, rotation, .. } = *self;
        let none = LoraLayer::default();
        let lora = student.lora.as_ref().unwrap_or(&none);
        let ([q, k, v], inputs) = decoder.walk_inputs(x, rotation, lora)?;
        let (out, attention) = walk_attention([&q, &k, &v], &student.attention, &student.config)?;
        let keeps = self.recompute != Recompute::Mlp;
        let (y, finish) = decoder.walk_finish(x, &out, lora, keeps)?;
        Ok((y, Walked { inputs, attention, finish }))
    }

    /// The layer in the tensor library's graph.
    fn graph(&self, x: &Tensor) -> Result<Tensor> {
        let Self { decoder, student, rotation, .. } = *self;
        let inputs = decoder.attention_inputs(x, rotation, Some(student))?;
        let gate = student.gate(&inputs.normed, decoder.head_dim)?;
        let attention = hybrid_attention(
            &inputs.q,
            &inputs.k,
            &inputs.v,
            &student.attention,
            gate.as_ref(),
            &student.config,
            None,
        )?;
        let keeps = self.recompute != Recompute::Mlp;
        Ok(decoder.finish_keeping(x, &attention.out, Some(student), keeps)?)
    }

    /// From the gradient of the output to that of the input, none if nothing is learned below; the store has those of what is
    /// learned here.
    pub fn back(&self, tape: Tape, dy: &Tensor) -> Result<(Option<Tensor>, GradStore)> {
        match tape {
            Tape::Input(x) => {
                let (_, tape) = self.pass(&x)?;
                self.back(tape, dy)
            }
            Tape::Graph { input, output } => {
                let mut grads = pull_back(&output, dy)?.backward()?;
                // The fused ops give their inputs' gradients whether anyone wants them or not.
                let dx = grads.remove(&input).filter(|_| self.wants_input);
                Ok((dx, grads))
            }
            Tape::Walked(walked) => walked.back(self, dy),
        }
    }
}

impl Walked {
    pub fn back(self, layer: &Layer<'_>, dy: &Tensor) -> Result<(Option<Tensor>, GradStore)> {
        let Self { inputs, attention, finish } = self;
        let mut noted = GradStore::default();
        let [dx, d_out] = finish.back(layer.decoder, dy, &mut noted)?;
        let ([dq, dk, dv], mut grads) = attention.back(&d_out)?;
        grads.extend(noted)?;
        let rows = [&dq, &dk, &dv];
        let dx = inputs.back(layer.decoder, rows, &dx, layer.wants_input, &mut grads)?;
        Ok((dx, grads))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use still_compute::random::uniform;
    use still_model::random::{random_model, tiny_config};
    use still_model::{Model, ModelConfig, Student};

    use super::*;
    use crate::parameters::trainable;
    use crate::recipe::Recipe;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> =
            (0..count).map(|i| 2.0 * uniform(seed, [0, 0, i]) as f32 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
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
        assert_eq!((got.dims(), got.dtype()), (expected.dims(), DType::F32), "{what}");
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (got, expected) = (flat(got), flat(expected));
        let size = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        assert!(size > 0.0 && error <= 1e-4 * size, "{what}: {error:e} of {size:e}");
    }

    /// The walk, whose ops the tensor library has on the CPU too, against the graph of the CPU's fused ones.
    #[test]
    fn walking_by_hand_is_the_graph() {
        use still_model::Architecture::{Llama, Qwen3};
        for (architecture, wants_input, biased) in
            [(Llama, true, false), (Llama, false, false), (Qwen3, true, false), (Llama, true, true)]
        {
            let model = model(architecture, biased);
            let set = ["attention.chunk=8", "attention.budget=2", "attention.init=normal"];
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
            let (student, parameters) = trainable(&moved.unwrap(), &Device::Cpu, |_| true).unwrap();
            let rotation = model.decoder.rotation(0, 45).unwrap();
            let width = model.config().hidden_size;
            let (x, dy) = (random(&[1, 45, width], 1), random(&[1, 45, width], 2));
            for recompute in [Recompute::Nothing, Recompute::Mlp, Recompute::Layer] {
                let layer = Layer {
                    decoder: &model.decoder.layers[1],
                    student: &student.layers[1],
                    rotation: &rotation,
                    recompute,
                    wants_input,
                };
                let what = format!("{architecture:?}, {recompute:?}, {wants_input}, {biased}");
                let (y, tape) = layer.forward(&x).unwrap();
                let (walked_y, walked) = layer.walk(&x).unwrap();
                assert_close(&walked_y, &y, &what);
                let (dx, grads) = layer.back(tape, &dy).unwrap();
                let (walked_dx, walked_grads) = walked.back(&layer, &dy).unwrap();
                assert_eq!((dx.is_some(), walked_dx.is_some()), (wants_input, wants_input));
                if let (Some(dx), Some(walked_dx)) = (dx, walked_dx) {
                    assert_close(&walked_dx, &dx, &what);
                }
                let mut compared = 0;
                for (name, var) in &parameters {
                    let (got, expected) = (walked_grads.get(var), grads.get(var));
                    assert_eq!(got.is_some(), expected.is_some(), "{what}: {name}");
                    if let (Some(got), Some(expected)) = (got, expected) {
                        assert_close(got, expected, &format!("{what}: {name}"));
                        compared += 1;
                    }
                }
                assert!(compared >= 11, "{what}: {compared} gradients");
            }
        }
    }
}
