#![doc = include_str!("../README.md")]

mod compare;
mod random;

pub use compare::{Errors, Values, assert_max_error, assert_relative_rms, relative_rms};
pub use random::{random, random_f32, uniform};
