#![doc = include_str!("../README.md")]
//!
//! # Files
//!
//! | file | content |
//! |---|---|
//! | `api` | OpenAI's interface over the engine, and the page |
//! | `engine` | requests that are read and continued together, by one thread |
//! | `states` | states that are kept: in memory, in a store, under names |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod api;
mod engine;
mod states;

pub use api::{BodyLimits, Grammar, Grammars, Keys, ServeError, Server, ServerOptions, Stopper};
pub use engine::{
    Counters, Engine, EngineError, EngineOptions, Event, Events, Failure, METRICS_CONTENT_TYPE,
    Refused, Request, TokenLogprobs, Usage,
};
pub use states::{StateError, StateInfo, StateList, StateStore, States};
