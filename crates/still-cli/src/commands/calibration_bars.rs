//! A bar for each phase of a calibration.

use still_train::Phase;

use crate::printer::Printer;
use crate::progress::Bar;

/// The bar of the phase that goes on, if one does.
pub struct CalibrationBars<'a> {
    printer: &'a Printer,
    bar: Option<(Phase, Bar)>,
}

impl<'a> CalibrationBars<'a> {
    /// Nothing has begun.
    pub fn new(printer: &'a Printer) -> Self {
        Self { printer, bar: None }
    }

    /// `tokens` more of `phase`'s `total` are passed.
    pub fn advance(&mut self, phase: Phase, tokens: usize, total: usize) {
        if self.bar.as_ref().is_none_or(|(known, _)| *known != phase) {
            self.finish();
            let bar = Bar::new(self.printer, "Calibrating", name(phase), total, "tokens");
            self.bar = Some((phase, bar));
        }
        if let Some((_, bar)) = &self.bar {
            bar.advance(tokens);
        }
    }

    /// The last phase is over.
    pub fn finish(&mut self) {
        if let Some((phase, bar)) = self.bar.take() {
            bar.done(format_args!("{}: done", name(phase)));
        }
    }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Retrieval => "retrieval heads",
        Phase::Text => "losses on text",
    }
}
