//! What a calibration will take, before it is done.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use still_model::Model;

use super::{CalibrateOptions, Phase, calibrate, candidates};
use crate::cache_plan::CachePlan;
use crate::data::{TokenCache, Windows};
use crate::error::Result;
use crate::recipe::Recipe;

/// Most tokens of the timed window: a longer one is cut, so that a plan takes seconds.
const TIMED_TOKENS: usize = 2048;

/// A calibration, estimated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalibrationPlan {
    /// Selection heads, each of which gets a budget.
    pub heads: usize,
    /// Budgets that are tried for each, ascending; none if nothing is calibrated.
    pub candidates: Vec<usize>,
    /// Tokens of the window of text that the speed was measured on.
    pub timed_tokens: usize,
    /// The student's attention cache compared with its teacher's.
    pub cache: CachePlan,
    /// In their order; none if nothing is calibrated.
    pub phases: Vec<PhasePlan>,
}

/// A phase of calibration, estimated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PhasePlan {
    /// The phase.
    pub phase: Phase,
    /// Tokens that go through the model.
    pub tokens: usize,
    /// Tokens per second of what was timed.
    pub tokens_per_s: f64,
    /// Seconds that all tokens take at that speed.
    pub seconds: f64,
}

/// Plans [`training_free`](crate::training_free): counts tokens and bytes, and calibrates on one window of the data to time it.
/// Nothing is written.
///
/// # Errors
/// As [`calibrate`] and [`Windows::read`]; a recipe that does not fit the model.
pub fn plan_training_free(
    model: &Model,
    recipe: &Recipe,
    data: &[PathBuf],
    cache: &TokenCache,
) -> Result<CalibrationPlan> {
    plan_calibration(model, &recipe.training_free(model.config())?, data, cache)
}

/// Plans the calibration that a run of `recipe` begins with, in the same way.
///
/// # Errors
/// The same.
pub fn plan_calibration(
    model: &Model,
    recipe: &Recipe,
    data: &[PathBuf],
    cache: &TokenCache,
) -> Result<CalibrationPlan> {
    let still = recipe.attention.resolve(model.config())?;
    let mut plan = CalibrationPlan {
        heads: still.budgets.iter().map(Vec::len).sum(),
        candidates: Vec::new(),
        timed_tokens: 0,
        cache: CachePlan::of(&still, model.config(), &recipe.calibration),
        phases: Vec::new(),
    };
    let Some(options) = recipe.calibration.options(recipe.seed) else { return Ok(plan) };
    let text = recipe.calibration.text(&recipe.data);
    let text = Windows::read(data, &model.tokenizer, &text, recipe.seed, cache)?
        .first_tokens(recipe.calibration.tokens);
    let longest = text.iter().max_by_key(|window| window.len()).map_or(&[][..], Vec::as_slice);
    // Longer than two chunks, or calibration refuses it.
    let least = 2 * still.chunk + 1;
    let cut = |tokens: usize| &longest[..longest.len().min(tokens.max(least))];
    // The first pass finds everything cold.
    time(model, recipe, cut(least), &CalibrateOptions { copies: 1, copy_length: 16, ..options })?;
    let timed = cut(TIMED_TOKENS);
    let speeds = time(model, recipe, timed, &CalibrateOptions { copies: 1, ..options })?;
    plan.candidates = candidates(still.chunk);
    plan.timed_tokens = timed.len();
    let phase = |(phase, tokens_per_s)| {
        let tokens = match phase {
            Phase::Retrieval => 2 * options.copies * options.copy_length,
            Phase::Text => text.iter().map(Vec::len).sum(),
        };
        PhasePlan { phase, tokens, tokens_per_s, seconds: tokens as f64 / tokens_per_s }
    };
    plan.phases = speeds.into_iter().map(phase).collect();
    Ok(plan)
}

/// Tokens per second of each phase of a calibration on one window.
fn time(
    model: &Model,
    recipe: &Recipe,
    window: &[u32],
    options: &CalibrateOptions,
) -> Result<Vec<(Phase, f64)>> {
    let begun: RefCell<Vec<(Phase, usize, Instant)>> = RefCell::default();
    calibrate(model, &recipe.attention, &[window], options, &|phase, _, tokens| {
        let mut begun = begun.borrow_mut();
        if begun.last().is_none_or(|(last, ..)| *last != phase) {
            begun.push((phase, tokens, Instant::now()));
        }
    })?;
    let end = Instant::now();
    let begun = begun.into_inner();
    let ends = begun.iter().skip(1).map(|(_, _, next)| *next).chain([end]);
    let speed = |(&(phase, tokens, start), end): (&(Phase, usize, Instant), Instant)| {
        (phase, tokens as f64 / (end - start).as_secs_f64())
    };
    Ok(begun.iter().zip(ends).map(speed).collect())
}
