//! The demo's training: one window a step, the teacher's hidden states computed once per window.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::Tensor;
use still_model::{Model, Student};
use still_train::{FinetuneRecipe, FinetuneStage, Recompute, TransferRecipe, TransferStage};

use super::text::DemoText;
use crate::printer::Printer;
use crate::progress::{Bar, Losses};

/// Trains students of one teacher on the demo's windows.
pub struct Trainer<'a> {
    teacher: &'a Model,
    text: &'a DemoText,
    seed: u64,
    printer: &'a Printer,
    /// The teacher's final-normed hidden states, `[N, E]`, by window: stage 1 leaves them, and both students that
    /// learn its logits read them.
    hidden: HashMap<usize, Tensor>,
}

impl<'a> Trainer<'a> {
    /// Nothing is computed yet.
    pub fn new(teacher: &'a Model, text: &'a DemoText, seed: u64, printer: &'a Printer) -> Self {
        Self { teacher, text, seed, printer, hidden: HashMap::new() }
    }

    /// Stage 1 over the windows of `steps`.
    ///
    /// # Errors
    /// A loss that is not a number.
    pub fn transfer(&mut self, student: Student, steps: Range<usize>) -> anyhow::Result<Student> {
        let recipe = TransferRecipe { steps: steps.len(), ..TransferRecipe::default() };
        let mut stage = TransferStage::new(self.teacher, &student, &recipe)?;
        let bar = Bar::new(self.printer, "Training", "stage 1", steps.len(), "windows");
        let mut losses = Losses::default();
        for step in steps {
            let index = self.text.window_of_step(step);
            let window = std::slice::from_ref(&self.text.train[index]);
            let mut done = stage.step(window)?;
            if let Some(hidden) = done.teacher_hidden.pop() {
                self.hidden.insert(index, hidden);
            }
            losses.add(done.report.loss);
            bar.message(format!("mean squared error {:.2e}", done.report.loss));
            bar.advance(1);
        }
        bar.done(format_args!("stage 1, attention transfer: {losses}"));
        Ok(stage.student()?)
    }

    /// Low-rank finetuning towards the teacher's logits over the windows of `steps`.
    ///
    /// # Errors
    /// A loss that is not a number.
    pub fn finetune(
        &mut self,
        name: &'static str,
        student: Student,
        steps: Range<usize>,
    ) -> anyhow::Result<Student> {
        // A window of 1024 tokens is short enough to keep every layer's graph.
        let recipe = FinetuneRecipe {
            steps: steps.len(),
            recompute: Recompute::Nothing,
            ..FinetuneRecipe::default()
        };
        let mut stage = FinetuneStage::new(self.teacher, &student, &recipe, self.seed)?;
        let bar = Bar::new(self.printer, "Training", name, steps.len(), "windows");
        let mut losses = Losses::default();
        for step in steps {
            let index = self.text.window_of_step(step);
            let window = &self.text.train[index];
            let hidden = match self.hidden.get(&index) {
                Some(hidden) => hidden.clone(),
                None => {
                    let hidden = stage.teacher_hidden(window.ids())?;
                    self.hidden.insert(index, hidden.clone());
                    hidden
                }
            };
            let report = stage.step(std::slice::from_ref(window), Some(&[hidden]))?;
            losses.add(report.loss);
            bar.message(format!("KL {:.4} nats", report.loss));
            bar.advance(1);
        }
        bar.done(format_args!("{name}, logit KL: {losses}"));
        Ok(stage.student()?)
    }
}
