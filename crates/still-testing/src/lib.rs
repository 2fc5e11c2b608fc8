#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod compare;
pub mod facts;
mod random;

pub use compare::{Errors, Values, assert_max_error, assert_relative_rms, relative_rms};
pub use random::{random, random_f32, uniform};
