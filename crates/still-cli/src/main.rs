//! The `still` command.

// `printer` alone writes to stdout and stderr: `eprintln!` ends a run whose stderr is closed or full.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod args;
mod commands;
mod disk;
mod errors;
mod interrupt;
mod log;
mod memory;
mod outputs;
mod page;
mod plot;
mod printer;
mod process;
mod progress;
mod ranges;
mod run_log;
mod shown;
mod table;
mod tensorboard;
mod threads;
mod usage;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::printer::Printer;

fn main() -> ExitCode {
    process::prepare();
    errors::install_panic_hook();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error),
    };
    let printer = Printer::new(cli.global.quiet, cli.global.verbose, cli.global.color);
    let work = || {
        // Before there is a thread that waits for signals.
        threads::settle(cli.global.threads)?;
        interrupt::install(&printer)?;
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
