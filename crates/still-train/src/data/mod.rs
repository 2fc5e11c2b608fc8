//! Data: files to windows of token ids, in a seeded order that a resumed run finds again.
//!
//! Text is tokenized once, into a file of ids that is mapped from then on ([`TokenCache`], `tokens`); documents are
//! cut into windows at the lengths of the recipe (`cut`); each epoch has an order of its own (`order`). Only the
//! places of documents and windows are held in memory, a few tens of bytes each.

mod cache;
mod chat;
mod cut;
mod documents;
mod heldout;
mod instruction;
mod kind;
mod lengths;
mod line;
mod mark;
mod order;
mod pieces;
#[cfg(feature = "parquet")]
mod rows;
mod summary;
mod tokenize;
mod tokens;
mod window;
mod windows;

pub use cache::TokenCache;
pub use kind::{check_data_file, data_files_in, is_data_file};
pub use order::Position;
pub use summary::DataSummary;
pub(crate) use window::shares;
pub use window::{Segment, Window};
pub use windows::Windows;
