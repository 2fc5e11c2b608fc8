#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod ablation;
mod bench;
mod bootstrap;
mod branches;
mod error;
mod gap;
pub mod long;
mod long_context;
mod nll;
pub mod operator;
mod passkey;
mod quantile;
mod repeated_text;
pub mod run;
mod speed;
pub mod task;
mod wilson;

pub use ablation::{Ablation, Factors, Skipped, THE_STUDENT, Variants};
pub use bench::{BenchOptions, BenchPoint, bench, bench_in_turn};
pub use bootstrap::{Interval, PairedBootstrap};
pub use branches::branch_shares_of;
pub use error::{EvalError, Result};
pub use gap::gap_closed;
pub use long_context::{ContextPoint, LongContext, LongContextOptions, long_context};
pub use nll::{Nll, evaluate_windows, nll_of_hidden};
pub use passkey::{PasskeyAnswer, PasskeyPrompt, PasskeyPrompts};
pub use repeated_text::{random_tokens, repeated_text_nll};
pub use speed::{DecodeSpeed, decode_speed};
pub use still_attention::BranchShares;
pub use wilson::wilson;
