#![cfg_attr(not(loom), doc = include_str!("../README.md"))]
#![cfg_attr(loom, doc = "Under loom, whose threads the README's example does not start.")]

mod phases;
mod sync;

pub use phases::{Failed, Phases, Work};
