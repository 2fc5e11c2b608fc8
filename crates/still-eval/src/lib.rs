#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `task` | tasks: items, questions, right answers; the harness's short tasks |
//! | `long` | long-context tasks: RULER, BABILong, pass keys, repeated text |
//! | `run` | asks a model a task's questions and scores the answers |
//! | `perplexity`, `nll` | losses of token ids |
//! | `compress` | compression of a dense model's cache, to compare at equal bytes |
//! | `ablation` | variants of a student's attention |
//! | `measure` | the same measurements of several models |
//! | `branches` | the share of each branch in a student's output |
//! | `bootstrap`, `wilson`, `quantile` | intervals and quantiles |
//! | `gap` | the share of a loss that training recovered |
//! | `timing` | wall-clock times on any device |
//! | `speed` | prefill and decode of a model |
//! | `operator` | the attention operator alone |
//! | `error` | errors of the evaluators |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod ablation;
mod bootstrap;
mod branches;
pub mod compress;
mod error;
mod gap;
pub mod long;
mod measure;
mod nll;
pub mod operator;
mod perplexity;
mod quantile;
pub mod run;
mod speed;
pub mod task;
pub mod timing;
mod wilson;

pub use ablation::{Ablation, Factors, Skipped, THE_STUDENT, Variants};
pub use bootstrap::{Interval, PairedBootstrap};
pub use branches::branch_shares_of;
pub use error::{EvalError, Result};
pub use gap::gap_closed;
pub use long::random_tokens;
pub use measure::{Document, Measured, Yardstick, perplexity_ratio};
pub use nll::nll_of_hidden;
pub use perplexity::{Nll, evaluate_windows};
pub use speed::{BenchPoint, ModelBench};
pub use still_attention::BranchShares;
pub use wilson::wilson;
