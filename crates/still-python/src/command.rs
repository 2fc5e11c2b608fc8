//! The `still` command, as the script of the same name runs it.

use std::ffi::OsString;
use std::io::Write;

use pyo3::prelude::*;

/// Runs the command; `arguments` begin with the program's name. Gives its exit code.
#[pyfunction]
pub fn run_command(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| {
        let code = still_cli::command_line(arguments);
        // A program in Rust does so at its end, and Python does not know of this buffer. Who reads no more has read enough.
        let _ = std::io::stdout().flush();
        code
    })
}
