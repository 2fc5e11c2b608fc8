//! A bar for each phase of a calibration.

use std::cell::RefCell;

use still_model::Model;
use still_train::{AttentionRecipe, CalibrateOptions, Calibration, Phase};

use crate::printer::Printer;
use crate::progress::Bar;

/// The bar of the phase that goes on, if one does.
pub struct CalibrationBars<'a> {
    printer: &'a Printer,
    /// While the text is read, of no phase.
    bar: Option<(Option<Phase>, Bar)>,
}

impl<'a> CalibrationBars<'a> {
    /// Nothing has begun.
    pub fn new(printer: &'a Printer) -> Self {
        Self { printer, bar: None }
    }

    /// The text is read.
    pub fn reading(&mut self) {
        self.bar = Some((None, Bar::new(self.printer, "Calibrating", "reading the text", 0, "")));
    }

    /// `tokens` more of `phase`'s `total` are passed.
    pub fn advance(&mut self, phase: Phase, tokens: usize, total: usize) {
        if self.bar.as_ref().is_none_or(|(known, _)| *known != Some(phase)) {
            self.finish();
            let bar = Bar::new(self.printer, "Calibrating", phase_name(phase), total, "tokens");
            self.bar = Some((Some(phase), bar));
        }
        if let Some((_, bar)) = &self.bar {
            bar.advance(tokens);
        }
    }

    /// The last phase is over.
    pub fn finish(&mut self) {
        if let Some((Some(phase), bar)) = self.bar.take() {
            bar.done(format_args!("{}: done", phase_name(phase)));
        }
    }
}

/// [`still_train::calibrate`], with bars.
///
/// # Errors
/// As that.
pub fn calibrate(
    model: &Model,
    recipe: &AttentionRecipe,
    windows: &[Vec<u32>],
    options: &CalibrateOptions,
    printer: &Printer,
) -> still_train::Result<Calibration> {
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let bars = RefCell::new(CalibrationBars::new(printer));
    let found = still_train::calibrate(model, recipe, &windows, options, &|phase, n, of| {
        bars.borrow_mut().advance(phase, n, of);
    })?;
    bars.into_inner().finish();
    Ok(found)
}

/// What a phase does, in two or three words.
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Retrieval => "retrieval heads",
        Phase::Text => "losses on text",
    }
}
