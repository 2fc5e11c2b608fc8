//! Stage 2, low-rank finetuning: the whole student learns to predict what its teacher predicts.

use std::borrow::Cow;

use candle_core::{Tensor, Var};
use still_compute::{Gradients, pull_back};
use still_model::{Dropout, Model, Student, StudentLayer};

use crate::data::{Segment, Window, shares};
use crate::error::{Result, TrainError};
use crate::layer_pass::LayerPass;
use crate::loss::{Target, vocabulary_loss};
use crate::metrics::{Stage, StepReport};
use crate::optimizer::AdamW;
use crate::parameters::{detached, is_attention, trainable};
use crate::recipe::{FinetuneRecipe, GuardRecipe, Objective, Recompute};
use crate::rotations::Rotations;
use crate::scalar::{Scalar, read};
use crate::update::Updates;

/// The stage and its optimizer.
#[derive(Debug)]
pub struct FinetuneStage {
    teacher: Model,
    student: Student,
    updates: Updates,
    /// `[vocab, E]`, in the dtype of activations: dequantized once, because the loss reads it twice a step.
    lm_head: Tensor,
    objective: Objective,
    recompute: Recompute,
    dropout: f64,
    seed: u64,
    rotations: Rotations,
}

impl FinetuneStage {
    /// A stage over the student's low-rank updates, added if it has none, and its attention if the recipe says so.
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
        let wanted = |name: &str| attention || !is_attention(name);
        let (student, parameters) = trainable(&student, model.decoder.device(), wanted)?;
        let optimizer = AdamW::new(recipe.optimizer, parameters, recipe.steps)?;
        Ok(Self {
            teacher: model.teacher(),
            student,
            updates: Updates::new(Stage::Finetune, optimizer),
            lm_head: model.decoder.lm_head.dense()?,
            objective: recipe.objective,
            recompute: recipe.recompute,
            dropout: recipe.dropout,
            seed,
            rotations: Rotations::default(),
        })
    }

    /// Skips steps that are spikes.
    #[must_use]
    pub fn with_guard(mut self, guard: &GuardRecipe) -> Self {
        self.updates.guard(guard);
        self
    }

    /// One optimizer step over windows of token ids.
    ///
    /// `teacher_hidden`: the teacher's final-normed hidden states of each segment, `[N, E]`, if they are known.
    ///
    /// # Errors
    /// A loss or gradient that is not a number (the step is then not taken); an id outside the vocabulary.
    pub fn step(
        &mut self,
        windows: &[Window],
        teacher_hidden: Option<&[Tensor]>,
    ) -> Result<StepReport> {
        let (loss, gradients) = self.gradients(windows, teacher_hidden)?;
        self.updates.update(loss, gradients, windows)
    }

    /// Loss and gradients of a step.
    pub(crate) fn gradients(
        &self,
        windows: &[Window],
        teacher_hidden: Option<&[Tensor]>,
    ) -> Result<(f64, Gradients)> {
        let mut gradients = self.updates.optimizer.gradients()?;
        let (mut losses, mut losses_shares) = (Vec::new(), Vec::new());
        let segments = shares(windows, |segment| segment.predictions(self.objective));
        for (i, (segment, share)) in segments.into_iter().enumerate() {
            if share > 0.0 {
                let hidden = teacher_hidden.map(|hidden| &hidden[i]);
                losses.push(self.segment(i, segment, hidden, share, &mut gradients)?);
                losses_shares.push(share);
            }
        }
        let mut loss = 0.0;
        for (of_segment, share) in read(&losses)?.into_iter().zip(losses_shares) {
            self.updates.check_loss(of_segment)?;
            loss += share * of_segment;
        }
        Ok((loss, gradients))
    }

    /// Loss of one sequence; adds `share` times its gradients.
    fn segment(
        &self,
        index: usize,
        Segment { ids, counted }: Segment<'_>,
        teacher_hidden: Option<&Tensor>,
        share: f64,
        gradients: &mut Gradients,
    ) -> Result<Scalar> {
        let decoder = &self.teacher.decoder;
        let rotation = self.rotations.of(decoder, ids.len())?;

        let layers: Vec<Option<Cow<'_, StudentLayer>>> = (0..decoder.layers.len())
            .map(|n| self.student.layer(n).map(|layer| self.with_dropout(layer, index, n)))
            .collect();
        // Nothing learned lies below the first layer that a student has; what keeps its attention there needs no backward pass.
        let first = layers.iter().position(Option::is_some).unwrap_or(layers.len());
        let layer = |n: usize| LayerPass {
            decoder: &decoder.layers[n],
            student: layers[n].as_deref(),
            rotation: &rotation,
            recompute: self.recompute,
            wants_input: n > first,
        };

        // Forward, cut between layers.
        let mut saved = Vec::with_capacity(layers.len());
        let mut x = decoder.embed(ids)?;
        for n in 0..layers.len() {
            let (output, activations) = layer(n).forward(&x)?;
            x = output;
            saved.push(activations);
        }

        // Loss and the gradient of the last hidden states.
        let last = Var::from_tensor(&x)?;
        let normed = decoder.final_norm(&last)?;
        let student_hidden = normed.detach().squeeze(0)?;
        let teacher = match (self.objective, teacher_hidden) {
            (Objective::CrossEntropy, _) => None,
            (_, Some(hidden)) => Some(hidden.clone()),
            (_, None) => Some(self.teacher_hidden(ids)?),
        };
        let target = match (&teacher, self.objective) {
            (Some(teacher), Objective::Mixed { kl }) => Target::Mixed { teacher, ids, kl },
            (Some(teacher), _) => Target::Teacher(teacher),
            (None, _) => Target::NextToken(ids),
        };
        let (loss, d_hidden) =
            vocabulary_loss(&student_hidden, &self.lm_head, target, counted, share)?;
        let grads = pull_back(&normed, &d_hidden.unsqueeze(0)?)?.backward()?;
        let mut upstream = match grads.get(&last) {
            Some(grad) => grad.clone(),
            None => return Ok(loss),
        };

        // Back through the layers.
        for (n, saved) in saved.into_iter().enumerate().skip(first).rev() {
            if let Some(input) = layer(n).backward(saved, &upstream, gradients)? {
                upstream = input;
            }
        }
        Ok(loss)
    }

    /// A layer with the dropout masks of the coming step, window and layer. They are the same at every call.
    fn with_dropout<'a>(
        &self,
        layer: &'a StudentLayer,
        window: usize,
        index: usize,
    ) -> Cow<'a, StudentLayer> {
        let (Some(lora), true) = (&layer.lora, self.dropout > 0.0) else {
            return Cow::Borrowed(layer);
        };
        // Steps count from 1 here: streams below 2³² are the data's and the initialization's.
        let step = self.updates.optimizer.step_count() as u64 + 1;
        let stream = (step << 32) | ((window as u64) << 18) | ((index as u64) << 3);
        let lora = lora.with_dropout(Dropout { rate: self.dropout, seed: self.seed, stream });
        Cow::Owned(StudentLayer { lora: Some(lora), ..layer.clone() })
    }

    /// The dense teacher's final-normed hidden states, `[N, E]`.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn teacher_hidden(&self, ids: &[u32]) -> Result<Tensor> {
        let decoder = &self.teacher.decoder;
        let rotation = self.rotations.of(decoder, ids.len())?;
        let x =
            decoder.visit_layers(decoder.embed(ids)?, &rotation, None, |_, layer, inputs| {
                Ok::<_, TrainError>(layer.softmax_attention(inputs)?)
            })?;
        Ok(decoder.final_norm(&x)?.squeeze(0)?)
    }

    /// The current student, low-rank updates unmerged.
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
