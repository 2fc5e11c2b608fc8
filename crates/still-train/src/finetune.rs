//! Stage 2, low-rank finetuning: the student as a whole learns to predict what the teacher predicts.

use candle_core::{Tensor, Var};
use still_attention::hybrid_attention;
use still_model::decoder::ops::pull_back;
use still_model::{DecoderLayer, Model, Rotation, Student, StudentLayer};

use crate::data::{Segment, Window, shares};
use crate::error::{Result, TrainError};
use crate::loss::{Target, vocabulary_loss};
use crate::metrics::{Stage, StepReport};
use crate::optimizer::AdamW;
use crate::parameters::{Accumulator, detached, is_attention, trainable};
use crate::recipe::{FinetuneRecipe, Objective};

/// The stage and its optimizer.
#[derive(Debug)]
pub struct FinetuneStage {
    teacher: Model,
    student: Student,
    optimizer: AdamW,
    /// `[vocab, E]` f32: widened once, as the loss reads it twice a step.
    lm_head: Tensor,
    objective: Objective,
    recompute: bool,
}

/// One layer of the forward pass, to be walked back through.
struct Tape {
    /// The layer's input; a variable where its gradient is needed.
    input: Tensor,
    /// The layer's output with its graph, unless it is to be computed again.
    output: Option<Tensor>,
}

impl FinetuneStage {
    /// A fresh optimizer over low-rank updates (added if the student has none) and, as the recipe says, the attention.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn new(
        model: &Model,
        student: &Student,
        recipe: &FinetuneRecipe,
        seed: u64,
    ) -> Result<Self> {
        let mut student = student.clone();
        if student.lora.is_none() {
            student.add_lora(model.config(), recipe.lora.clone(), seed)?;
        }
        let attention = recipe.train_attention && student.config.branches.linear;
        let (student, parameters) = trainable(&student, |name| attention || !is_attention(name))?;
        let optimizer = AdamW::new(recipe.optimizer, parameters, recipe.steps)?;
        Ok(Self {
            teacher: model.teacher(),
            student,
            optimizer,
            lm_head: model.decoder.lm_head.to_tensor()?,
            objective: recipe.objective,
            recompute: recipe.recompute,
        })
    }

    /// One optimizer step over windows of token ids.
    ///
    /// `teacher_hidden`: the teacher's final-normed hidden states of each segment, `[N, E]`, if they are at hand.
    ///
    /// # Errors
    /// A loss or gradient that is not a number (the step is then not taken); an id outside the vocabulary.
    pub fn step(
        &mut self,
        windows: &[Window],
        teacher_hidden: Option<&[Tensor]>,
    ) -> Result<StepReport> {
        let mut gradients = Accumulator::new(self.optimizer.parameters());
        let mut loss = 0.0;
        let segments = shares(windows, |segment| segment.predictions(self.objective));
        for (i, (segment, share)) in segments.into_iter().enumerate() {
            if share > 0.0 {
                let hidden = teacher_hidden.map(|hidden| &hidden[i]);
                loss += share * self.segment(segment, hidden, share, &mut gradients)?;
            }
        }
        let lr = self.optimizer.lr();
        let grad_norm = self.optimizer.step(Stage::Finetune.name(), &gradients.into_gradients())?;
        Ok(StepReport {
            stage: Stage::Finetune,
            step: self.optimizer.step_count(),
            loss,
            grad_norm,
            lr,
            tokens: windows.iter().map(Window::len).sum(),
            layer_losses: Vec::new(),
        })
    }

    /// Loss of one sequence; adds `share` times its gradients.
    fn segment(
        &self,
        Segment { ids, counted }: Segment<'_>,
        teacher_hidden: Option<&Tensor>,
        share: f64,
        gradients: &mut Accumulator,
    ) -> Result<f64> {
        let decoder = &self.teacher.decoder;
        let rotation = decoder.rotation(0, ids.len())?;
        let batch = Tensor::new(ids, decoder.device())?.unsqueeze(0)?;

        // Forward, cut between layers.
        let mut tapes = Vec::with_capacity(decoder.layers.len());
        let mut x = decoder.embed(&batch)?;
        for (n, (layer, student)) in decoder.layers.iter().zip(&self.student.layers).enumerate() {
            // Nothing learned lies below the first layer.
            let input = if n == 0 { x } else { Var::from_tensor(&x)?.into_inner() };
            let output = student_layer(layer, student, &input, &rotation)?;
            x = output.detach();
            tapes.push(Tape { input, output: (!self.recompute).then_some(output) });
        }

        // Loss and the gradient of the last hidden states.
        let last = Var::from_tensor(&x)?;
        let normed = decoder.final_norm(&last)?;
        let student_hidden = normed.detach().squeeze(0)?;
        let computed;
        let target = match (self.objective, teacher_hidden) {
            (Objective::CrossEntropy, _) => Target::NextToken(ids),
            (Objective::LogitKl, Some(hidden)) => Target::Teacher(hidden),
            (Objective::LogitKl, None) => {
                computed = self.teacher_hidden(ids)?;
                Target::Teacher(&computed)
            }
        };
        let (loss, d_hidden) = vocabulary_loss(&student_hidden, &self.lm_head, target, counted)?;
        if !loss.is_finite() {
            return Err(TrainError::NotFinite {
                stage: Stage::Finetune.name(),
                step: self.optimizer.step_count(),
                what: "the loss",
                value: loss,
            });
        }
        let grads = pull_back(&normed, &d_hidden.unsqueeze(0)?)?.backward()?;
        let mut upstream = match grads.get(&last) {
            Some(grad) => grad.clone(),
            None => return Ok(loss),
        };

        // Back through the layers.
        let layers = decoder.layers.iter().zip(&self.student.layers);
        for (tape, (layer, student)) in tapes.into_iter().zip(layers).rev() {
            let output = match tape.output {
                Some(output) => output,
                None => student_layer(layer, student, &tape.input, &rotation)?,
            };
            let grads = pull_back(&output, &upstream)?.backward()?;
            gradients.add(self.optimizer.parameters(), &grads, share)?;
            if let Some(grad) = grads.get(&tape.input) {
                upstream = grad.clone();
            }
        }
        Ok(loss)
    }

    /// The dense teacher's final-normed hidden states, `[N, E]`.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn teacher_hidden(&self, ids: &[u32]) -> Result<Tensor> {
        let mut cache = self.teacher.new_cache(1, still_attention::RowDtype::F32)?;
        let ids = Tensor::new(ids, self.teacher.decoder.device())?.unsqueeze(0)?;
        Ok(self.teacher.forward(&ids, &mut cache, None)?.squeeze(0)?)
    }

    /// The student as it is now, low-rank updates unmerged.
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
}

/// One layer with the student's attention and updates, differentiable.
fn student_layer(
    layer: &DecoderLayer,
    student: &StudentLayer,
    x: &Tensor,
    rotation: &Rotation,
) -> Result<Tensor> {
    let inputs = layer.attention_inputs(x, rotation, Some(student))?;
    let gate = student.gate(&inputs.normed, layer.head_dim)?;
    let attention = hybrid_attention(
        &inputs.q,
        &inputs.k,
        &inputs.v,
        &student.attention,
        gate.as_ref(),
        &student.config,
        None,
    )?;
    Ok(layer.finish(x, &attention.out, Some(student))?)
}
