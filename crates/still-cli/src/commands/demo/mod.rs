//! `still demo`: a student compared with its teacher on this machine; with `--train`, a student that is trained here.

mod args;
mod shipped;
mod train;

use still_model::DEMO_STUDENT;

pub use self::args::DemoArgs;
use crate::printer::Printer;

/// Runs the command.
pub fn run(args: &DemoArgs, printer: &Printer) -> anyhow::Result<()> {
    match args.train {
        true => train::run(args, printer),
        false => shipped::run(args, args.model.as_deref().unwrap_or(DEMO_STUDENT), printer),
    }
}
