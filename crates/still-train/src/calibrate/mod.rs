//! Calibration: a budget of salient tokens for every head, within a share of the dense cache's bytes.
//!
//! 1. Every head gets the smallest budget that holds an attention sink.
//! 2. Heads that retrieve keep all tokens, the strongest first. A head retrieves if it attends to the matching token of a random
//!    sequence that is fed twice ([`retrieval`]).
//! 3. The remaining bytes go, step by step, to the head whose loss falls most per byte. One backward pass over text estimates these
//!    losses ([`marginal`], [`allocate()`]).
//!
//! The pass over text also measures how large the channels of keys are, and gives coded keys their exponents ([`key_ranges`]).
//!
//! Bytes are those of rows in the dtype that the student stores ([`AttentionRecipe::rows`]).

mod allocate;
mod budgets;
mod for_run;
mod head_bytes;
mod key_ranges;
mod marginal;
mod outlook;
mod plan;
mod retrieval;

use serde::Serialize;
use still_attention::{Mode, Router, RowDtype, StateBytes, StillConfig};
use still_model::{FeatureInit, Model, ModelConfig, Student};

pub use budgets::Budgets;
pub use for_run::calibrated_recipe;
pub use outlook::{Outcome, Outlook};
pub use plan::{CalibrationPlan, PhasePlan, plan_calibration, plan_training_free};

use crate::error::{Result, TrainError};
use crate::recipe::AttentionRecipe;
use allocate::{Choice, Taken, allocate};
use head_bytes::HeadBytes;
use key_ranges::KeyRanges;
use outlook::outlook;

/// Options of [`calibrate`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CalibrateOptions {
    /// Bytes of the student's cache while decoding, as a share of the dense cache with 16-bit rows.
    pub cache_fraction: f64,
    /// Tokens of context at which that share holds.
    pub at_length: usize,
    /// Tokens of the random sequence that is fed twice.
    pub copy_length: usize,
    /// Random sequences.
    pub copies: usize,
    /// A head retrieves if at least this share of its attention is on the matching token and its successor.
    pub retrieval_threshold: f64,
    /// Seed of the random sequences and of the feature maps.
    pub seed: u64,
}

/// Default share of the layers that a student replaces.
const USUAL_SHARE: f64 = 0.2;

impl CalibrateOptions {
    /// The default share of a model's dense cache after `tokens` tokens: a fifth of the layers that a student replaces, and all
    /// of the layers with a sliding window.
    pub fn usual_cache_fraction(model: &ModelConfig, tokens: usize) -> f64 {
        let layers = model.full_layers().count() as u64;
        let row = 2 * model.num_key_value_heads * RowDtype::Bf16.row_bytes(model.head_dim);
        let replaced = layers.saturating_mul(tokens as u64).saturating_mul(row as u64) as f64;
        let dense = model.dense_cache_bytes(tokens, RowDtype::Bf16) as f64;
        let kept = (dense - replaced) / dense.max(1.0);
        kept + USUAL_SHARE * (1.0 - kept)
    }
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        Self {
            cache_fraction: USUAL_SHARE,
            at_length: 8192,
            copy_length: 512,
            copies: 2,
            retrieval_threshold: 0.1,
            seed: 0,
        }
    }
}

/// The calibration of one selection head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeadReport {
    /// Layer and selection head.
    pub layer: usize,
    /// Number of the selection head within its layer.
    pub head: usize,
    /// Attention of its strongest query head to the matching token and its successor: 0 to 1.
    pub retrieval: f64,
    /// Estimated loss of each candidate budget, nats a token, in the order of [`Calibration::candidates`].
    pub losses: Vec<f64>,
    /// Its budget.
    pub budget: usize,
    /// Whether it keeps all tokens because it retrieves.
    pub retrieves: bool,
}

/// The result of [`calibrate`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// The budgets.
    #[serde(flatten)]
    pub budgets: Budgets,
    /// Budgets whose loss was estimated, ascending.
    pub candidates: Vec<usize>,
    /// By layer, then head.
    pub heads: Vec<HeadReport>,
    /// Bytes of the cache after `at_length` tokens.
    pub cache_bytes: usize,
    /// The same bytes by content.
    pub cache_parts: StateBytes,
    /// Bytes of the dense cache, 16-bit rows.
    pub dense_bytes: usize,
    /// The largest uniform budget with at most as many bytes, if there is one.
    pub uniform_budget: Option<usize>,
    /// Tokens of text from which the losses were estimated.
    pub tokens: usize,
    /// Results for other shares and other dtypes of rows.
    pub outlook: Vec<Outlook>,
}

impl Calibration {
    /// The budgets of another share, from an [`Outlook`].
    pub fn budgets_at(&self, rows: RowDtype, outcome: &Outcome) -> Budgets {
        let mut budgets = vec![Vec::new(); self.budgets.budgets.len()];
        for (head, &budget) in self.heads.iter().zip(&outcome.budgets) {
            budgets[head.layer].push(budget);
        }
        let cache_fraction = outcome.cache_fraction;
        Budgets { budgets, cache_fraction, rows, ..self.budgets.clone() }
    }

    /// The outlook for the rows that the budgets were found for, if it was computed.
    pub fn own_outlook(&self) -> Option<&Outlook> {
        self.outlook.iter().find(|outlook| outlook.rows == self.budgets.rows)
    }
}

/// A phase of calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Random sequences fed twice.
    Retrieval,
    /// Forward and backward passes over text.
    Text,
}

/// Finds budgets for a student with the attention of `recipe`. The recipe's own budgets do not matter.
///
/// * `windows`: token ids of text, about 64,000 in all.
/// * `progress(phase, more, of)`: receives the tokens since its last call, and the phase's tokens in all.
///
/// # Errors
/// A share that is too small for any budget; windows too short to retire a chunk; an error of the model.
pub fn calibrate(
    model: &Model,
    recipe: &AttentionRecipe,
    windows: &[&[u32]],
    options: &CalibrateOptions,
    progress: &dyn Fn(Phase, usize, usize),
) -> Result<Calibration> {
    let teacher = model.teacher();
    let plain = AttentionRecipe { budget: 0, ..recipe.without_calibration() };
    let config = plain.resolve(model.config())?;
    refuse_unfit(&config, windows)?;
    let rows = config.rows.unwrap_or_default();
    let candidates = candidates(config.chunk);
    let (of, at_length) = (model.config(), options.at_length);
    // Before anything is computed. Keys that need more bits are known later.
    HeadBytes::new(&config, of, &candidates, at_length).sizes(rows).check_least(options)?;
    let student =
        Student::init(config.clone(), model.config(), FeatureInit::Identity, options.seed)?
            .to_device(model.device())?;
    let (choices, ranges) = measure(&teacher, &student, &candidates, windows, options, progress)?;
    let config = StillConfig { key_exponents: ranges.exponents(), ..config };
    let bytes = HeadBytes::new(&config, of, &candidates, at_length);
    let own = bytes.sizes(rows);
    own.check_least(options)?;
    let limit = own.limit(options.cache_fraction);
    let allocation = allocate(&choices, &own.by_head, limit, options.retrieval_threshold)
        .expect("the smallest budgets fit");
    let of_rows = |rows| bytes.sizes(rows);
    let outlook = outlook(&choices, &candidates, options.retrieval_threshold, of_rows);
    let reports = reports(choices, &allocation, &candidates, &student);
    let cache_parts = bytes.held(&reports, rows);
    let (cache_bytes, dense_bytes) = (cache_parts.total(), bytes.dense());
    let uniform_budget = bytes.uniform_budget(rows, cache_bytes);
    let mut budgets = vec![Vec::new(); model.config().num_hidden_layers];
    for report in &reports {
        budgets[report.layer].push(report.budget);
    }
    Ok(Calibration {
        budgets: Budgets {
            chunk: config.chunk,
            budgets,
            cache_fraction: options.cache_fraction,
            at_length,
            selection_head: config.selection_head,
            router: config.router,
            rows,
            key_exponents: config.key_exponents.clone(),
            fingerprint: None,
        },
        candidates,
        heads: reports,
        cache_bytes,
        cache_parts,
        dense_bytes,
        uniform_budget,
        tokens: windows.iter().map(|window| window.len()).sum(),
        outlook,
    })
}

/// The estimated loss of each head with each budget, whether it retrieves, and the ranges of keys.
fn measure(
    teacher: &Model,
    student: &Student,
    candidates: &[usize],
    windows: &[&[u32]],
    options: &CalibrateOptions,
    progress: &dyn Fn(Phase, usize, usize),
) -> Result<(Vec<Choice>, KeyRanges)> {
    let copied = 2 * options.copies * options.copy_length;
    progress(Phase::Retrieval, 0, copied);
    let retrieval = retrieval::scores(teacher, &student.config, options, &|tokens| {
        progress(Phase::Retrieval, tokens, copied);
    })?;
    let text = windows.iter().map(|window| window.len()).sum();
    progress(Phase::Text, 0, text);
    let mut ranges = KeyRanges::new(teacher.config());
    let told = |tokens| progress(Phase::Text, tokens, text);
    let losses = marginal::losses(teacher, student, candidates, windows, &mut ranges, &told)?;
    let heads = retrieval.iter().zip(&losses);
    let heads = heads.flat_map(|(retrieval, losses)| retrieval.iter().zip(losses));
    let choice =
        |(&retrieval, losses): (&f64, &Vec<f64>)| Choice { retrieval, losses: losses.clone() };
    Ok((heads.map(choice).collect(), ranges))
}

/// An attention without salient tokens has no budgets, and text within a window retires no chunk.
fn refuse_unfit(config: &StillConfig, windows: &[&[u32]]) -> Result<()> {
    if config.mode != Mode::Hybrid || config.router == Router::None {
        return Err(fail(
            "this attention keeps no salient tokens, so that there is nothing to find".into(),
            "use a recipe with a router, such as recipes/quick.toml",
        ));
    }
    if !windows.iter().any(|window| window.len() > 2 * config.chunk) {
        return Err(fail(
            format!("no text is longer than two chunks of {}", config.chunk),
            "give longer documents, or longer windows",
        ));
    }
    Ok(())
}

/// By layer, then head.
fn reports(
    choices: Vec<Choice>,
    allocation: &[Taken],
    candidates: &[usize],
    student: &Student,
) -> Vec<HeadReport> {
    let per_layer = choices.len() / student.layers.len().max(1);
    choices
        .into_iter()
        .zip(allocation)
        .enumerate()
        .map(|(index, (choice, taken))| HeadReport {
            layer: student.layers[index / per_layer].config.layer,
            head: index % per_layer,
            retrieval: choice.retrieval,
            losses: choice.losses,
            budget: candidates[taken.candidate],
            retrieves: taken.retrieves,
        })
        .collect()
}

/// Candidate budgets for a chunk. Small ones are closer together, because one more token changes most there.
fn candidates(chunk: usize) -> Vec<usize> {
    let mut all: Vec<usize> =
        [0, 1, 2, 4, 8, 16, 32, 64].iter().map(|share| share * chunk / 64).collect();
    all.extend([1, 2].iter().filter(|&&budget| budget <= chunk));
    all.sort_unstable();
    all.dedup();
    all
}

/// Tokens of `tokens` to report at the end of layer `n`. Layers report equal shares, which add up to `tokens`.
fn share(tokens: usize, n: usize, layers: usize) -> usize {
    tokens * (n + 1) / layers - tokens * n / layers
}

fn fail(what: String, hint: &str) -> TrainError {
    TrainError::Calibration { what, hint: hint.into() }
}
