//! Stage 1, attention transfer: the hybrid attention of each layer learns to give what softmax attention gives.

use candle_core::Tensor;
use still_attention::{dense_attention, hybrid_attention};
use still_model::decoder::ops::pull_back;
use still_model::{Model, Student};

use crate::data::{Window, shares};
use crate::error::{Result, TrainError};
use crate::loss::mean_squared_error;
use crate::metrics::{Stage, StepReport};
use crate::optimizer::AdamW;
use crate::parameters::{Accumulator, detached, is_attention, trainable};
use crate::recipe::TransferRecipe;

/// The stage and its optimizer. The base weights stay as they are.
#[derive(Debug)]
pub struct TransferStage {
    teacher: Model,
    student: Student,
    optimizer: AdamW,
}

/// What a step did, and what it computed on the way.
#[derive(Debug)]
pub struct TransferStep {
    /// Loss, norm and rate.
    pub report: StepReport,
    /// The teacher's final-normed hidden states of each segment, `[N, E]`: stage 2 can use them again.
    pub teacher_hidden: Vec<Tensor>,
}

impl TransferStage {
    /// A fresh optimizer over the student's feature maps, reflections, `ℓ`, `w` and gate.
    ///
    /// # Errors
    /// A student without a linear branch: it has nothing to learn here.
    pub fn new(model: &Model, student: &Student, recipe: &TransferRecipe) -> Result<Self> {
        if !student.config.branches.linear {
            return Err(TrainError::Recipe {
                what: "attention transfer of a student without a linear branch".into(),
                hint: "set transfer.steps to 0".into(),
            });
        }
        let (student, parameters) = trainable(student, is_attention)?;
        let optimizer = AdamW::new(recipe.optimizer, parameters, recipe.steps)?;
        Ok(Self { teacher: model.teacher(), student, optimizer })
    }

    /// One optimizer step over windows of token ids. Each layer's graph is dropped before the next layer.
    ///
    /// Every segment is a sequence of its own, and every position counts: attention has to be right at a prompt, too.
    ///
    /// # Errors
    /// A loss or gradient that is not a number (the step is then not taken); an id outside the vocabulary.
    pub fn step(&mut self, windows: &[Window]) -> Result<TransferStep> {
        let decoder = &self.teacher.decoder;
        let mut gradients = Accumulator::new(self.optimizer.parameters());
        let mut layer_losses = vec![0.0; decoder.layers.len()];
        let mut teacher_hidden = Vec::with_capacity(windows.len());
        for (segment, share) in shares(windows, |segment| segment.ids.len()) {
            let ids = Tensor::new(segment.ids, decoder.device())?.unsqueeze(0)?;
            let rotation = decoder.rotation(0, segment.ids.len())?;
            let mut x = decoder.embed(&ids)?;
            for (n, (layer, student)) in decoder.layers.iter().zip(&self.student.layers).enumerate()
            {
                let inputs = layer.attention_inputs(&x, &rotation, None)?;
                let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
                let target = dense_attention(q, k, v)?;
                let gate = student.gate(&inputs.normed, layer.head_dim)?;
                let (weights, config) = (&student.attention, &student.config);
                let out = hybrid_attention(q, k, v, weights, gate.as_ref(), config, None)?.out;
                let (value, gradient) = mean_squared_error(&out, &target)?;
                if !value.is_finite() {
                    return Err(self.not_finite(value));
                }
                layer_losses[n] += value * share;
                let grads = pull_back(&out, &gradient)?.backward()?;
                gradients.add(self.optimizer.parameters(), &grads, share)?;
                x = layer.finish(&x, &target, None)?;
            }
            teacher_hidden.push(decoder.final_norm(&x)?.squeeze(0)?);
        }
        let lr = self.optimizer.lr();
        let grad_norm = self.optimizer.step(Stage::Transfer.name(), &gradients.into_gradients())?;
        let report = StepReport {
            stage: Stage::Transfer,
            step: self.optimizer.step_count(),
            loss: layer_losses.iter().sum::<f64>() / layer_losses.len().max(1) as f64,
            grad_norm,
            lr,
            tokens: windows.iter().map(Window::len).sum(),
            layer_losses,
        };
        Ok(TransferStep { report, teacher_hidden })
    }

    /// The student as it is now.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn student(&self) -> Result<Student> {
        detached(&self.student)
    }

    /// The optimizer, to save or restore.
    pub(crate) fn optimizer(&mut self) -> &mut AdamW {
        &mut self.optimizer
    }

    fn not_finite(&self, value: f64) -> TrainError {
        TrainError::NotFinite {
            stage: Stage::Transfer.name(),
            step: self.optimizer.step_count(),
            what: "the loss",
            value,
        }
    }
}
