//! The windows cut from the demo's books.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use still_eval::task::{Task, WindowOptions, windows};
use still_model::Tokenizer;
use still_train::Window;

use crate::books;
use crate::errors::user;
use crate::verdict;

/// Tokens of a training window.
pub const TRAIN_WINDOW: usize = 1024;
/// Tokens of a window that budgets are found on: longer than training's, because what a budget loses grows with length.
const CALIBRATION_WINDOW: usize = 2048;
/// Windows that budgets are found on.
const CALIBRATION_WINDOWS: usize = 4;
/// Tokens of a held-out window.
pub const EVAL_WINDOW: usize = 4096;
/// Positions of a held-out window that count for perplexity at 1k.
pub const SHORT: usize = 1024;

/// The tokenized demo text.
#[derive(Debug)]
pub struct DemoText {
    /// Windows of [`TRAIN_WINDOW`] tokens in a seeded order.
    pub train: Vec<Window>,
    /// Token ids of the longer windows that budgets are found on, spread over the training text.
    pub calibration: Vec<Vec<u32>>,
}

impl DemoText {
    /// Tokenizes the books and shuffles the training windows.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn new(tokenizer: &Tokenizer, seed: u64) -> anyhow::Result<Self> {
        let tokens = tokenizer.encode(books::TRAINING.text, true)?;
        let longer: Vec<&[u32]> = tokens.chunks_exact(CALIBRATION_WINDOW).collect();
        let every = longer.len().div_ceil(CALIBRATION_WINDOWS).max(1);
        let calibration = longer.iter().step_by(every).map(|ids| ids.to_vec()).collect();
        let mut train: Vec<Window> =
            tokens.chunks_exact(TRAIN_WINDOW).map(|ids| Window::from(ids.to_vec())).collect();
        train.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        Ok(Self { train, calibration })
    }

    /// Index of the window that the `step`-th training step reads: past the last it begins again.
    pub fn window_of_step(&self, step: usize) -> usize {
        step % self.train.len()
    }
}

/// Perplexity of so many held-out windows of [`EVAL_WINDOW`] tokens, in reading order.
///
/// # Errors
/// If the held-out text has fewer windows under this tokenizer.
pub fn heldout(tokenizer: &Tokenizer, count: usize) -> anyhow::Result<Task> {
    let options = WindowOptions { length: EVAL_WINDOW, stride: None, limit: None };
    let mut heldout = windows(books::HELDOUT.text, tokenizer, &options)?;
    heldout.name = verdict::HELDOUT.into();
    let available = heldout.items.len();
    if count == 0 || count > available {
        return Err(user(
            format!("--windows {count} is out of range"),
            format!("the held-out text has 1 to {available} windows of {EVAL_WINDOW} tokens"),
        ));
    }
    heldout.items.truncate(count);
    Ok(heldout)
}
