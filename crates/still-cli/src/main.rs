//! The `still` command.

mod args;
mod commands;
mod errors;
mod interrupt;
mod memory;
mod page;
mod plot;
mod printer;
mod progress;
mod run_log;
mod table;
mod tensorboard;
mod threads;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::printer::Printer;

fn main() -> ExitCode {
    memory::keep_freed_blocks();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are results; everything else is the user's to mend, whatever clap numbers it.
            let failed = error.use_stderr();
            let _ = error.print();
            return ExitCode::from(if failed { errors::EXIT_USER } else { 0 });
        }
    };
    let printer = Printer::new(cli.global.quiet, cli.global.verbose, cli.global.color);
    errors::install_panic_hook();
    let work = || {
        threads::settle(cli.global.threads)?;
        run(cli.command, &printer)
    };
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => errors::report(&printer, &error),
        // The hook has said what happened.
        Err(_) => ExitCode::from(errors::EXIT_INTERNAL),
    }
}

fn run(command: Command, printer: &Printer) -> anyhow::Result<()> {
    match command {
        Command::Demo(args) => commands::demo::run(&args, printer),
        Command::Linearize(args) => commands::linearize::run(&args, printer),
        Command::Calibrate(args) => commands::calibrate::run(&args, printer),
        Command::Report(args) => commands::report::run(&args, printer),
        Command::Export(args) => commands::export::run(&args, printer),
        Command::Generate(args) => commands::generate::run(&args, printer),
        Command::Chat(args) => commands::chat::run(&args, printer),
        Command::Inspect(args) => commands::inspect::run(&args, printer),
        Command::Bench(args) => commands::bench::run(&args, printer),
        Command::Eval(args) => commands::eval::run(&args, printer),
        Command::Doctor(args) => commands::doctor::run(&args, printer),
    }
}
