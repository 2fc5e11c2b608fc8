//! Ctrl-C as a flag, so that a reply can be cut short without ending the command.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C raises the flag; when it is raised already, Ctrl-C ends the process.
///
/// # Errors
/// If the system refuses the handler.
pub fn catch() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot catch Ctrl-C")
}

/// Whether Ctrl-C was pressed since the flag was last lowered.
pub fn raised() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Lowers the flag; says whether it was raised.
pub fn take() -> bool {
    INTERRUPTED.swap(false, Ordering::SeqCst)
}
