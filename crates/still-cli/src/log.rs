//! The libraries' log (`tracing`), in the printer's format.

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::printer::Printer;

/// From now on events are printed: warnings always, more of them by `verbose`.
pub fn install(printer: &Printer, quiet: bool, verbose: u8) {
    let all = |level| Targets::new().with_default(level);
    let filter = match (quiet, verbose) {
        (true, _) => all(LevelFilter::ERROR),
        (_, 0) => all(LevelFilter::WARN),
        (_, 1) => all(LevelFilter::WARN).with_targets(
            ["still_model", "still_train", "still_eval"].map(|own| (own, LevelFilter::INFO)),
        ),
        _ => all(LevelFilter::DEBUG),
    };
    let lines = Lines { printer: printer.clone(), with_target: verbose > 1 };
    // A second printer in one process (tests) keeps the first one's log.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

struct Lines {
    printer: Printer,
    with_target: bool,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text(String::new());
        if self.with_target {
            let _ = write!(text.0, "{}: ", event.metadata().target());
        }
        event.record(&mut text);
        let text = text.0.trim_end();
        match *event.metadata().level() {
            Level::ERROR | Level::WARN => self.printer.warn(text),
            level => self.printer.note(format_args!("{}: {text}", level.as_str().to_lowercase())),
        }
    }
}

/// The message, then other fields as `name=value`.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}
