//! One module per command, with its arguments, and modules that several commands share.
//!
//! | file | content |
//! |---|---|
//! | `demo`, `linearize`, `calibrate`, `export` | train |
//! | `generate`, `chat`, `ask`, `serve` | run |
//! | `eval`, `bench` | evaluate |
//! | `inspect`, `report` | look |
//! | `recipes`, `models`, `doctor`, `completions`, `man` | set up |
//! | `model`, `cache`, `recipe`, `data`, `training`, `generation`, `sampling`, `shape`, `input` | arguments that several commands share |
//! | `sessions` | what `ask` and `chat` have in common |
//! | `calibration_bars`, `fetching` | bars: of each phase of a calibration, of each file of a hub |

pub mod ask;
pub mod bench;
mod cache;
pub mod calibrate;
mod calibration_bars;
pub mod chat;
pub mod completions;
pub mod data;
pub mod demo;
pub mod doctor;
pub mod eval;
pub mod export;
mod fetching;
pub mod generate;
mod generation;
mod input;
pub mod inspect;
pub mod linearize;
pub mod man;
mod model;
pub mod models;
mod recipe;
pub mod recipes;
pub mod report;
mod sampling;
pub mod serve;
mod sessions;
mod shape;
mod training;

use std::ops::ControlFlow;
use std::path::Path;

use crate::interrupt;
use crate::printer::{Printer, Written};

/// Chunk length of the students that commands make without a recipe.
const CHUNK: usize = 64;
/// Salient tokens that they keep of each chunk.
const BUDGET: usize = 4;

/// What a generation does with its text: shows it (unless told not to) until Ctrl-C, or until standard output fails,
/// which `written` then tells.
fn stream_to<'a>(
    printer: &'a Printer,
    show: bool,
    written: &'a mut Written,
) -> impl FnMut(&str) -> ControlFlow<()> + 'a {
    move |piece| {
        if show {
            *written = printer.stream(piece);
        }
        if written.is_err() || interrupt::raised() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

/// The last part of a model's path.
fn short_name(model: &str) -> String {
    let name = Path::new(model).file_name();
    name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}
