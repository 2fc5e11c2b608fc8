//! Progress of a prefill: a document or a message.

use std::sync::{Arc, Mutex, PoisonError};

use still_model::OnRead;

use super::Bar;
use crate::printer::Printer;
use crate::table;

/// Fewer tokens than this are read before a bar could be looked at.
const WORTH_A_BAR: usize = 512;

/// A bar of tokens that are read; its clones are one bar.
#[derive(Clone, Debug)]
pub struct ReadingBar {
    printer: Printer,
    name: String,
    /// Tokens that the model was trained for.
    trained: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    bar: Option<Bar>,
    read: usize,
    /// It disappears when everything is read, and says nothing.
    passes: bool,
}

impl ReadingBar {
    /// The bar of a document; [`ReadingBar::done`] replaces it by a line.
    pub fn of_document(printer: &Printer, name: String) -> Self {
        Self { printer: printer.clone(), name, trained: usize::MAX, state: Arc::default() }
    }

    /// The bar of a prompt or a message: it shows if that is long, until it is read.
    pub fn of_prompt(printer: &Printer) -> Self {
        let bar = Self::of_document(printer, "the prompt".into());
        bar.with(|state| state.passes = true);
        bar
    }

    /// Of a model that was trained for `tokens`: a longer text is warned of before it is read, not when it was.
    pub fn within(self, tokens: usize) -> Self {
        Self { trained: tokens, ..self }
    }

    /// `more` of `total` tokens have been read; none of them at first.
    pub fn advance(&self, more: usize, total: usize) {
        if more == 0 && total > self.trained {
            self.printer.warn(format_args!(
                "{} has {} tokens, and the base was trained for {}: expect worse answers",
                self.name,
                table::count(total),
                table::count(self.trained)
            ));
        }
        self.with(|state| {
            if more == 0 && (!state.passes || total >= WORTH_A_BAR) {
                let bar = Bar::new(&self.printer, "Reading", &self.name, total, "tokens");
                state.bar = Some(bar);
            }
            state.read += more;
            if let Some(bar) = &state.bar {
                bar.advance(more);
            }
            if state.passes && state.read >= total {
                state.bar = None;
            }
        });
    }

    /// For a generation.
    pub fn listener(&self) -> OnRead {
        let bar = self.clone();
        OnRead::new(move |more, total| bar.advance(more, total))
    }

    /// Ends it, with a line about the document's `tokens`.
    pub fn done(&self) {
        self.with(|state| {
            if let Some(bar) = state.bar.take() {
                let speed = state.read as f64 / bar.seconds().max(1e-9);
                bar.done(format_args!("{}: {} tokens, {speed:.0}/s,", self.name, state.read));
            }
        });
    }

    fn with(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
