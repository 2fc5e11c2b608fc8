//! Estimates before a run: parameters, tokens, memory and time.

use std::time::Instant;

use serde::Serialize;
use still_model::decoder::Part;
use still_model::{Model, ModelConfig, Student, Weight};

use crate::cache_plan::CachePlan;
use crate::data::{Position, Window, Windows};
use crate::error::Result;
use crate::finetune::FinetuneStage;
use crate::loss;
use crate::metrics::Stage;
use crate::recipe::{Objective, Recipe, Recompute};
use crate::run::TrainingStage;
use crate::transfer::TransferStage;

/// Most tokens of a timed window. Longer windows are cut, so that a plan takes seconds.
const TIMED_TOKENS: usize = 2048;
/// Tokens of the warm-up steps.
const WARMUP_TOKENS: usize = 64;
/// Most windows that are read to count a stage's tokens.
const MOST_WINDOWS: usize = 100_000;
/// Bytes of an f32: all that is learned, and logits.
const F32: usize = 4;

/// The estimate of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Bytes of the base model's weights as they lie in memory.
    pub weights_bytes: usize,
    /// Tokens of the window on which each stage's speed was measured.
    pub timed_tokens: usize,
    /// The student's attention cache compared with its teacher's.
    pub cache: CachePlan,
    /// The stages with at least one step.
    pub stages: Vec<StagePlan>,
}

/// The estimate of a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StagePlan {
    /// The stage.
    pub stage: Stage,
    /// Number of trained values.
    pub parameters: usize,
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens read by all steps.
    pub tokens: usize,
    /// Tokens of the longest window.
    pub longest_window: usize,
    /// Peak memory in bytes, weights included, counted from shapes. Evaluations do not count.
    pub peak_bytes: usize,
    /// Tokens per second of the timed step.
    pub tokens_per_s: f64,
    /// Seconds of all steps at that speed. Evaluations and checkpoints do not count.
    pub seconds: f64,
}

/// Plans a run of `recipe` over `windows`: counts values, tokens and bytes, and times one step of each stage on the model. It
/// trains and writes nothing.
///
/// # Errors
/// A recipe that does not fit the model; a loss that is not a number.
pub fn plan(model: &Model, recipe: &Recipe, windows: &Windows) -> Result<Plan> {
    let still = recipe.attention.resolve(model.config())?;
    let cache = CachePlan::of(&still, model.config(), &recipe.calibration);
    let student = Student::init(still, model.config(), recipe.attention.init, recipe.seed)?;
    let mut position = Position::default();
    let sizes = Sizes::new(model)?;
    let mut plan =
        Plan { weights_bytes: sizes.weights, timed_tokens: 0, cache, stages: Vec::new() };
    if recipe.transfer.steps > 0 {
        let read =
            Reading::of(windows, &mut position, recipe.transfer.steps, recipe.transfer.batch);
        let mut stage = TransferStage::new(model, &student, &recipe.transfer)?;
        let bytes =
            |values: &Values| sizes.transfer(values, read.longest.len(), recipe.transfer.batch);
        plan.add(Stage::Transfer, &mut stage, &read, recipe.transfer.steps, bytes)?;
    }
    if recipe.finetune.steps > 0 {
        let read =
            Reading::of(windows, &mut position, recipe.finetune.steps, recipe.finetune.batch);
        let mut stage = FinetuneStage::new(model, &student, &recipe.finetune, recipe.seed)?;
        let bytes = |values: &Values| sizes.finetune(values, read.longest.len(), recipe);
        plan.add(Stage::Finetune, &mut stage, &read, recipe.finetune.steps, bytes)?;
    }
    Ok(plan)
}

impl Plan {
    fn add(
        &mut self,
        kind: Stage,
        stage: &mut dyn TrainingStage,
        read: &Reading,
        steps: usize,
        bytes: impl FnOnce(&Values) -> usize,
    ) -> Result<()> {
        let trained = stage.updates().optimizer.parameters();
        let parameters = trained.iter().map(|(_, var)| var.elem_count()).sum();
        let values = Values { trained: parameters, student: stage.current()?.parameters() };
        let timed = &read.longest[..read.longest.len().min(TIMED_TOKENS)];
        let window = |ids: &[u32]| [Window::from(ids.to_vec())];
        stage.train(&window(&timed[..timed.len().min(WARMUP_TOKENS)]))?;
        let started = Instant::now();
        stage.train(&window(timed))?;
        let tokens_per_s = timed.len() as f64 / started.elapsed().as_secs_f64();
        self.timed_tokens = self.timed_tokens.max(timed.len());
        self.stages.push(StagePlan {
            stage: kind,
            parameters,
            steps,
            tokens: read.tokens,
            longest_window: read.longest.len(),
            peak_bytes: bytes(&values),
            tokens_per_s,
            seconds: read.tokens as f64 / tokens_per_s,
        });
        Ok(())
    }
}

/// The windows of a stage.
struct Reading {
    tokens: usize,
    /// Token ids of the longest sequence.
    longest: Vec<u32>,
}

impl Reading {
    /// Reads the windows in the order of the run. For a long run it reads the first ones and extrapolates.
    fn of(windows: &Windows, position: &mut Position, steps: usize, batch: usize) -> Self {
        let mut read = Self { tokens: 0, longest: Vec::new() };
        let mut count = 0;
        for _ in 0..steps {
            for window in windows.next_one_by_one(position, batch).take(MOST_WINDOWS - count) {
                count += 1;
                read.tokens += window.len();
                let longest = window.segments().max_by_key(|segment| segment.ids.len());
                if let Some(longest) = longest.filter(|s| s.ids.len() > read.longest.len()) {
                    read.longest = longest.ids.to_vec();
                }
            }
        }
        let share = (steps * batch) as f64 / count.max(1) as f64;
        read.tokens = (read.tokens as f64 * share) as usize;
        read
    }
}

/// Numbers of values.
pub(crate) struct Values {
    pub trained: usize,
    pub student: usize,
}

/// Bytes of the parts that memory goes to. `N` is the longest window's tokens, `E` the hidden width, `I` the MLP's,
/// `Q = H·D`, `K` that of the keys.
pub(crate) struct Sizes<'a> {
    config: &'a ModelConfig,
    /// Of an activation, and of a weight that is no matrix.
    value: usize,
    on_cpu: bool,
    /// Rows whose logits exist at a time.
    block_rows: usize,
    /// Of all frozen weights, as they lie.
    pub weights: usize,
    /// Of the largest one, dequantized for a product's gradient; 0 if none is 16-bit or quantized.
    widened: usize,
    /// Of the head, dequantized for the loss; 0 if it is neither 16-bit nor quantized.
    head: usize,
    layers: usize,
}

impl<'a> Sizes<'a> {
    pub fn new(model: &'a Model) -> Result<Self> {
        let decoder = &model.decoder;
        let wide = |weight: &Weight| -> Result<usize> {
            let (out, inner) = weight.dims2()?;
            Ok(match weight {
                Weight::Dense(_) => 0,
                Weight::Packed(_) => out * inner * F32,
                Weight::Quantized(matrix) => out * inner * matrix.dtype().size_in_bytes(),
            })
        };
        let (mut weights, mut widened) = (0, 0);
        for (name, part) in decoder.parts() {
            weights += part.size_bytes();
            if let (Part::Matrix(weight), true) = (part, name.starts_with("model.layers.")) {
                widened = widened.max(wide(weight)?);
            }
        }
        Ok(Self {
            config: &decoder.config,
            value: decoder.dtype().size_in_bytes(),
            on_cpu: decoder.device().is_cpu(),
            block_rows: loss::block_rows(decoder.device(), decoder.config.vocab_size),
            weights,
            widened,
            head: wide(&decoder.lm_head)?,
            layers: decoder.layers.len(),
        })
    }

    /// `(E, I, Q, K)` of one token, bytes.
    fn widths(&self) -> (usize, usize, usize, usize) {
        let ModelConfig { hidden_size, intermediate_size, head_dim, .. } = *self.config;
        let (q, k) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let of = |values: usize| self.value * values;
        (of(hidden_size), of(intermediate_size), of(q * head_dim), of(k * head_dim))
    }

    /// The student as it came, as it is trained and as it is saved; gradient and both moments.
    fn learned(values: &Values) -> usize {
        F32 * (3 * values.student + 3 * values.trained)
    }

    /// Stage 1, with windows of `tokens`: one layer at a time, whatever the depth.
    pub fn transfer(&self, values: &Values, tokens: usize, batch: usize) -> usize {
        let (e, i, q, k) = self.widths();
        // x, its norm, q, k and v; then target, output and their difference, [k | v], and the kernel's two gradients.
        let inputs = 2 * e + q + 2 * k;
        let attention = 3 * q + 2 * k + (q + 2 * k);
        // Heads merged, o_proj, residual, norm, gate and up, and the layer's output; target and output still there.
        let after_attention = 2 * q + q + 4 * e + 2 * i;
        let layer = tokens * (inputs + attention.max(after_attention));
        self.weights + Self::learned(values) + layer + self.widened + batch * tokens * e
    }

    /// Stage 2, with windows of `tokens`: every layer's input, and the saved activations of one layer or, depending on
    /// `recompute`, of all.
    pub fn finetune(&self, values: &Values, tokens: usize, recipe: &Recipe) -> usize {
        let (e, i, q, k) = self.widths();
        let inputs = tokens * (self.layers + 1) * e;
        // Norm, projections before and after the rotation, [k | v], output, merged heads, o_proj, residual, gate and
        // up, and the layer's output.
        let narrow = match self.on_cpu {
            true => tokens * (4 * e + 4 * q + 6 * k),
            // Walked by hand: three hidden states, queries, output and merged heads, keys and values, their maps and the states of
            // every chunk.
            false => tokens * (3 * e + 3 * q + 4 * k + k * self.config.head_dim / 32),
        };
        let wide = tokens * 2 * i;
        let graph = narrow + wide;
        let graphs = match recipe.finetune.recompute {
            Recompute::Layer => graph,
            Recompute::Mlp => self.layers * narrow + wide,
            Recompute::Nothing => self.layers * graph,
        };
        // A gradient for each of them.
        let backward = tokens * (5 * e + 4 * q + 6 * k + 2 * i) + self.widened;
        let teacher = match recipe.finetune.objective {
            Objective::CrossEntropy => 0,
            _ => 1,
        };
        // The teacher reads the window a layer at a time.
        let reading = teacher * tokens * (4 * e + 3 * q + 2 * k + 2 * i);
        let block = self.block_rows.min(tokens) * self.config.vocab_size * F32;
        // Logits turn into their gradient in place on the CPU alone.
        let blocks = if self.on_cpu { 1 + teacher } else { 3 * (1 + teacher) };
        let loss = blocks * block + tokens * (3 + teacher) * e;
        let kept = if recipe.finetune.recompute == Recompute::Layer { 0 } else { graphs };
        let busiest = (graphs + backward).max(kept + reading).max(kept + loss);
        self.weights + self.head + Self::learned(values) + inputs + busiest
    }
}
