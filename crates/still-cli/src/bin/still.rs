//! The `still` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(still_cli::command_line(std::env::args_os().collect()))
}
