//! Phases of work that several threads go through together.
//!
//! A decode step is a few hundred products of some ten microseconds each, every one of which needs the whole of the one
//! before. All threads run the whole step; of each phase they take what nobody has taken yet. A thread waits for pieces that
//! are being worked on, never for a thread: one that has lost its core while it held nothing is passed over, and finds the
//! phases that went by without it over. Who waits looks for some microseconds, as long as most waits take, and then
//! sleeps, so that a busy machine's other processes do not run in its place.
//!
//! Nothing here knows what the work is. `tests/loom.rs` goes through the orders in which threads can meet:
//! `RUSTFLAGS="--cfg loom" cargo test --release -p still-threads`.

mod phases;
mod sync;

pub use phases::{Failed, Phases, Work};
