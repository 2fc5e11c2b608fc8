//! The engine from outside.

mod common;

mod limits;
mod named_states;
mod prefixes;
mod state_store;
mod streams;
