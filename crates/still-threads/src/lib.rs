#![cfg_attr(not(loom), doc = include_str!("../README.md"))]
#![cfg_attr(loom, doc = "Under loom, whose threads the README's example does not start.")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod phases;
mod sync;

pub use phases::{Failed, Phases, Work};
