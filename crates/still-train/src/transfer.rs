//! Stage 1, attention transfer: each layer's hybrid attention learns the output of softmax attention.

use candle_core::Tensor;
use still_attention::{Branches, HybridConfig, Routing, attention_forward};
use still_compute::{Gradients, pull_back};
use still_model::decoder::ops::merge_heads;
use still_model::{DecoderLayer, LoraLayer, Model, Student, StudentLayer};

use crate::data::{Window, shares};
use crate::error::{Result, TrainError};
use crate::loss::{mean_squared_error, variance};
use crate::metrics::{LayerLosses, Stage, StepReport};
use crate::optimizer::AdamW;
use crate::parameters::{detached, is_attention, trainable};
use crate::recipe::{GuardRecipe, TransferLoss, TransferRecipe};
use crate::rotations::Rotations;
use crate::scalar::{Scalar, read};
use crate::update::Updates;

/// The stage and its optimizer. The base weights are frozen.
#[derive(Debug)]
pub struct TransferStage {
    teacher: Model,
    student: Student,
    loss: TransferLoss,
    normalise: bool,
    linear_branch_weight: f64,
    /// Of every layer's gradients.
    gradient_scale: f64,
    rotations: Rotations,
    updates: Updates,
}

/// The result of a step.
#[derive(Debug)]
pub struct TransferStep {
    /// Loss, norm and rate.
    pub report: StepReport,
    /// The teacher's final-normed hidden states of each segment, `[N, E]`, which stage 2 can reuse.
    pub teacher_hidden: Vec<Tensor>,
}

/// Losses and gradients of a step's windows.
pub(crate) struct TransferGradients {
    gradients: Gradients,
    /// Total loss of each layer that learns.
    layer_losses: Vec<f64>,
    /// Unweighted loss of each layer's linear branch; empty if the branch has no loss of its own.
    linear_losses: Vec<f64>,
    teacher_hidden: Vec<Tensor>,
}

/// A loss of one attention output of one segment.
struct Compared {
    layer: usize,
    /// Whether the output is that of the linear branch alone.
    is_linear: bool,
    weight: f64,
    /// The segment's share of the step.
    share: f64,
    loss: Scalar,
}

impl TransferGradients {
    /// Mean over the layers.
    pub fn loss(&self) -> f64 {
        self.layer_losses.iter().sum::<f64>() / self.layer_losses.len().max(1) as f64
    }

    /// Gradients of the total loss.
    #[cfg(test)]
    pub fn into_gradients(self) -> Gradients {
        self.gradients
    }
}

impl TransferStage {
    /// A stage over the student's feature maps, reflections, `ℓ`, `w` and gate.
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
        let (student, parameters) = trainable(student, model.decoder.device(), is_attention)?;
        let optimizer = AdamW::new(recipe.optimizer, parameters, recipe.steps)?;
        let gradient_scale = recipe.gradient_scale(student.layers.len());
        Ok(Self {
            teacher: model.teacher(),
            student,
            loss: recipe.loss,
            normalise: recipe.normalise,
            linear_branch_weight: recipe.linear_branch_weight,
            gradient_scale,
            rotations: Rotations::default(),
            updates: Updates::new(Stage::Transfer, optimizer),
        })
    }

    /// Skips steps that are spikes.
    #[must_use]
    pub fn with_guard(mut self, guard: &GuardRecipe) -> Self {
        self.updates.guard(guard);
        self
    }

    /// One optimizer step over windows of token ids. What a layer saves is dropped before the next layer.
    ///
    /// Every segment is a sequence of its own, and every position counts: attention has to be right at a prompt, too.
    ///
    /// # Errors
    /// A loss or gradient that is not a number (the step is then not taken); an id outside the vocabulary.
    pub fn step(&mut self, windows: &[Window]) -> Result<TransferStep> {
        let done = self.gradients(windows)?;
        let report = self.updates.update(done.loss(), done.gradients, windows)?;
        let TransferGradients { layer_losses, linear_losses, teacher_hidden, .. } = done;
        let layers = self.numbers();
        let report = StepReport { layers, layer_losses, linear_losses, ..report };
        Ok(TransferStep { report, teacher_hidden })
    }

    /// Losses of the current student's layers on windows.
    ///
    /// # Errors
    /// As [`TransferStage::step`].
    pub(crate) fn layer_losses(&self, windows: &[Window]) -> Result<LayerLosses> {
        let layer_losses = self.gradients(windows)?.layer_losses;
        Ok(LayerLosses { layers: self.numbers(), layer_losses })
    }

    /// Numbers of the layers that learn; empty if every layer does.
    fn numbers(&self) -> Vec<usize> {
        let all = self.teacher.config().num_hidden_layers;
        let learn = self.student.layers.iter().map(|own| own.config.layer);
        if self.student.layers.len() == all { Vec::new() } else { learn.collect() }
    }

    /// Losses and gradients of a step.
    pub(crate) fn gradients(&self, windows: &[Window]) -> Result<TransferGradients> {
        let decoder = &self.teacher.decoder;
        let mut gradients = self.updates.optimizer.gradients()?;
        let mut compared = Vec::new();
        let mut teacher_hidden = Vec::with_capacity(windows.len());
        // The teacher's projections, but for the gate, which is the student's own.
        let gated =
            |student: &StudentLayer| StudentLayer { lora: gate_update(student), ..student.clone() };
        let layers = self.student.layers.iter().map(gated).collect();
        let gated = Student { layers, ..self.student.clone() };
        for (segment, share) in shares(windows, |segment| segment.ids.len()) {
            let rotation = self.rotations.of(decoder, segment.ids.len())?;
            let x = decoder.embed(segment.ids)?;
            let x = decoder.visit_layers(x, &rotation, Some(&gated), |n, layer, inputs| {
                let attention = layer.softmax_attention(inputs)?;
                // A layer that keeps its attention has nothing to learn.
                let Some(student) = self.student.layer(n) else { return Ok(attention) };
                let target = self.compared(layer, &attention)?;
                let variance = self.normalise.then(|| variance(&target)).transpose()?;
                let (rows, gate) = ([&inputs.q, &inputs.k, &inputs.v], inputs.gate.as_ref());
                // Notes the loss of one attention output; adds `weight` times its gradients, scaled.
                let mut compare = |config: &HybridConfig,
                                   routing: Option<&Routing>,
                                   weight: f64,
                                   is_linear: bool|
                 -> Result<Routing> {
                    let weights = &student.attention;
                    let (output, saved) =
                        attention_forward(rows, gate, weights, config, routing, false)?;
                    let out = self.compared(layer, &output.out)?;
                    let scale = share * weight * self.gradient_scale;
                    let (loss, gradient) =
                        mean_squared_error(&out, &target, variance.as_ref(), scale)?;
                    let d_out = self.compared_backward(layer, gradient)?;
                    let d_gate = saved.backward(&d_out, &mut gradients)?.gate;
                    self.gate_backward(gate.zip(d_gate.as_ref()), &mut gradients)?;
                    compared.push(Compared { layer: n, is_linear, weight, share, loss });
                    Ok(output.routing)
                };
                let routing = compare(&student.config, None, 1.0, false)?;
                if self.linear_branch_weight > 0.0 {
                    let alone = linear_alone(&student.config);
                    compare(&alone, Some(&routing), self.linear_branch_weight, true)?;
                }
                Ok::<_, TrainError>(attention)
            })?;
            teacher_hidden.push(decoder.final_norm(&x)?.squeeze(0)?);
        }
        let (layer_losses, linear_losses) = self.losses(&compared)?;
        Ok(TransferGradients { gradients, layer_losses, linear_losses, teacher_hidden })
    }

    /// The total loss of each layer that learns, and that of its linear branch.
    fn losses(&self, compared: &[Compared]) -> Result<(Vec<f64>, Vec<f64>)> {
        let layers = &self.student.layers;
        let mut all = vec![0.0; layers.len()];
        let mut linear = vec![0.0; if self.linear_branch_weight > 0.0 { layers.len() } else { 0 }];
        let losses: Vec<Scalar> = compared.iter().map(|compared| compared.loss.clone()).collect();
        for (compared, loss) in compared.iter().zip(read(&losses)?) {
            self.updates.check_loss(loss)?;
            let n = layers.partition_point(|own| own.config.layer < compared.layer);
            all[n] += compared.share * compared.weight * loss;
            if compared.is_linear {
                linear[n] += compared.share * loss;
            }
        }
        Ok((all, linear))
    }

    /// What the loss compares of an attention output `[B, H, N, D]`: itself, or `[B, N, E]` after `o_proj`.
    fn compared(&self, layer: &DecoderLayer, attention: &Tensor) -> Result<Tensor> {
        Ok(match self.loss {
            TransferLoss::HeadMse => attention.clone(),
            TransferLoss::OutputMse => layer.o_proj.forward(&merge_heads(attention)?, None)?,
        })
    }

    /// The gradient of an attention output from that of [`TransferStage::compared`].
    fn compared_backward(&self, layer: &DecoderLayer, gradient: Tensor) -> Result<Tensor> {
        if self.loss == TransferLoss::HeadMse {
            return Ok(gradient);
        }
        let (batch, tokens, _) = gradient.dims3()?;
        let merged = layer.o_proj.backward(&gradient)?;
        Ok(merged.reshape((batch, tokens, (), layer.head_dim))?.transpose(1, 2)?)
    }

    /// Adds the gradients of the projection of an output gate, which is in its graph, from the gate's own.
    fn gate_backward(
        &self,
        gate: Option<(&Tensor, &Tensor)>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Some((gate, d_gate)) = gate else { return Ok(()) };
        let grads = pull_back(gate, d_gate)?.backward()?;
        for (_, var) in self.updates.optimizer.parameters() {
            if let Some(gradient) = grads.get(var) {
                gradients.add(var, gradient)?;
            }
        }
        Ok(())
    }

    /// The current student.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn student(&self) -> Result<Student> {
        detached(&self.student)
    }

    /// The optimizer and its guard, to save or restore.
    pub(crate) fn updates(&mut self) -> &mut Updates {
        &mut self.updates
    }
}

/// The update of the output gate, which no projection of the teacher's has.
fn gate_update(student: &StudentLayer) -> Option<LoraLayer> {
    let g = student.lora.as_ref().and_then(|lora| lora.g.clone());
    g.map(|g| LoraLayer { g: Some(g), ..LoraLayer::default() })
}

/// The linear branch by itself: of the exact keys only the token's own remains.
fn linear_alone(config: &HybridConfig) -> HybridConfig {
    let branches = Branches { window: false, salient: false, linear: true };
    HybridConfig { branches, ..config.clone() }
}
