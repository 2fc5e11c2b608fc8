//! The command from outside, a module a subject. One executable: each would link the models again. `kill`, `signals` and
//! `fuzz` are executables of their own, because they watch the clock.

#[path = "../common/mod.rs"]
mod common;

mod ask;
mod bad_input;
mod bench;
mod calibrate;
mod chat;
mod chat_template;
#[cfg(unix)]
mod chat_terminal;
mod cli;
mod data;
mod demo;
mod eval;
mod eval_long;
mod export;
mod file_maps;
mod generate;
mod hub;
mod inspect;
#[cfg(unix)]
mod journey;
#[cfg(not(all(feature = "parquet", feature = "serve")))]
mod left_out;
mod linearize;
#[cfg(unix)]
mod outputs;
mod report;
mod report_evals;
#[cfg(all(unix, feature = "serve"))]
mod serve;
mod sliding_window;
#[cfg(unix)]
mod streams;
mod tensorboard;
