//! `still demo`: a student compared with its teacher on this machine; with `--train`, one that is made here.

mod args;
mod shipped;
mod train;

pub use self::args::DemoArgs;
use crate::printer::Printer;

/// Runs the command.
pub fn run(args: &DemoArgs, printer: &Printer) -> anyhow::Result<()> {
    match &args.model {
        Some(student) if !args.train => shipped::run(args, student, printer),
        _ => train::run(args, printer),
    }
}
