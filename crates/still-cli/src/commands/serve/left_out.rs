//! The command in a build without the feature `serve`.

use super::ServeArgs;
use crate::errors::left_out;
use crate::printer::Printer;

/// There are none.
#[derive(Debug)]
pub enum Settings {}

impl ServeArgs {
    /// # Errors
    /// Always: there is no server.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        Err(left_out("server", "serve"))
    }
}

/// Never called, as there are no settings.
pub fn run(settings: Settings, _: &Printer) -> anyhow::Result<()> {
    match settings {}
}
