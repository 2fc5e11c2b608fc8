//! The `still` command, as a library: the program runs [`command_line`], and so does the Python package.
//!
//! | file | content |
//! |---|---|
//! | `cli` | the command line as a whole, and the options of all commands |
//! | `commands` | a module per command, with its arguments |
//! | `args` | values of arguments: enums by their names, numbers within ranges |
//! | `printer`, `progress`, `log` | all that is written to the terminal |
//! | `errors` | an error as one line, a hint and an exit code |
//! | `interrupt`, `terminal` | what Ctrl-C and other signals do; the terminal as it was before a chat |
//! | `outputs`, `disk` | files that a command will write, checked before it begins; room for them |
//! | `run_log` | a run's directory, read back |
//! | `provenance` | the command, the day and the machine that a result is from |
//! | `verdict` | a student compared with its teacher, in a table and a sentence |
//! | `books` | the texts that ship with the command |
//! | `table`, `wrap`, `plot`, `page` | plain-text tables, text in lines of a width, charts, HTML pages |
//! | `tensorboard`, `event_file` | scalars of a run for TensorBoard; the file format |
//! | `shown` | text of others without control characters |
//! | `process`, `threads`, `memory` | the process before it does anything; threads; memory |

// `printer` alone writes to stdout and stderr: `eprintln!` ends a run whose stderr is closed or full.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod args;
mod books;
mod cli;
mod commands;
mod disk;
mod errors;
mod event_file;
mod interrupt;
mod log;
mod memory;
mod outputs;
mod page;
mod plot;
mod printer;
mod process;
mod progress;
mod provenance;
mod run_log;
mod shown;
mod table;
mod tensorboard;
mod terminal;
mod threads;
mod verdict;
mod wrap;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use crate::commands::data::data_files;
pub use crate::commands::eval::plan::{Asked, Plan, Questions};
pub use crate::errors::{Description, ErrorKind, describe};

use crate::cli::{Cli, Command, usage};
use crate::printer::Printer;

/// Runs the command that `arguments` say, the program's name first, and returns its exit code. It takes the process over: signals,
/// threads, the terminal. It must come before anything that computes, and before there are other threads.
pub fn command_line(arguments: Vec<OsString>) -> u8 {
    process::prepare();
    errors::install_panic_hook();
    let cli = match Cli::read(arguments.iter().cloned()) {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error, &arguments),
    };
    let printer = Printer::new(cli.global.quiet, cli.global.verbose, cli.global.color);
    let work = || {
        // Before there is a thread that waits for signals.
        threads::settle(cli.global.threads)?;
        interrupt::install(&printer)?;
        run(cli.command, &printer)
    };
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => errors::EXIT_DONE,
        Ok(Err(error)) => errors::report(&printer, &error),
        // The hook has said what happened.
        Err(_) => errors::EXIT_INTERNAL,
    }
}

fn run(command: Command, printer: &Printer) -> anyhow::Result<()> {
    use commands::{
        ask, bench, calibrate, chat, completions, demo, doctor, eval, export, generate, inspect,
        linearize, man, models, recipes, report, serve,
    };
    match command {
        Command::Demo(args) => demo::run(&args, printer),
        Command::Linearize(args) => linearize::run(&args.resolve(printer)?, printer),
        Command::Calibrate(args) => calibrate::run(&args.resolve(printer)?, printer),
        Command::Export(args) => export::run(&args.resolve()?, printer),
        Command::Ask(args) => ask::run(&args.resolve()?, printer),
        Command::Generate(args) => generate::run(&args.resolve()?, printer),
        Command::Chat(args) => chat::run(&args.resolve()?, printer),
        Command::Eval(args) => eval::run(&args.resolve()?, printer),
        Command::Bench(args) => bench::run(args, printer),
        Command::Inspect(args) => inspect::run(&args, printer),
        Command::Report(args) => report::run(args, printer),
        Command::Recipes(args) => recipes::run(&args, printer),
        Command::Models(args) => models::run(&args, printer),
        Command::Doctor(args) => doctor::run(&args, printer),
        Command::Serve(args) => serve::run(args.resolve()?, printer),
        Command::Completions(args) => completions::run(&args, cli::command(), printer),
        Command::Man(args) => man::run(&args, cli::command(), printer),
    }
}
