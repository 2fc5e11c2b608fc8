//! Texts and data that a command reads.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::Path;

use anyhow::Context;
use still_model::files;

use crate::errors::user;
use crate::printer::Printer;

/// Reads a text file.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    files::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Reads a text that is read once: from a file, or from a pipe such as a shell's `<(…)`.
pub fn read_text_once(path: &Path, printer: &Printer) -> anyhow::Result<String> {
    let kind = std::fs::metadata(path).ok().as_ref().and_then(files::kind);
    let opened = || File::open(path).with_context(|| format!("cannot read {}", path.display()));
    let name = path.display().to_string();
    match kind {
        Some("a named pipe") => {
            printer.note(format_args!("reading {name} until its writer closes it"));
            read_piped(opened()?, &name)
        }
        Some("a device") => {
            let device = opened()?;
            if device.is_terminal() { read_piped(device, &name) } else { read_text(path) }
        }
        _ => read_text(path),
    }
}

/// Most bytes of a text that comes through a pipe, which has no end until its writer gives it one.
const PIPED_BYTES: u64 = 256 << 20;

/// Most bytes of a message.
const MESSAGE_BYTES: u64 = 16 << 20;

/// Reads a text to the end of a pipe or a terminal.
pub fn read_piped(pipe: impl Read, name: &str) -> anyhow::Result<String> {
    read_at_most(PIPED_BYTES, pipe, name)
}

/// Reads a message to the end of standard input.
pub fn read_message(stdin: impl Read) -> anyhow::Result<String> {
    read_at_most(MESSAGE_BYTES, stdin, "standard input")
}

fn read_at_most(most: u64, pipe: impl Read, name: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    pipe.take(most + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    if bytes.len() as u64 > most {
        return Err(user(
            format!("{name} gives more than {} MiB of text", most >> 20),
            "give a shorter text",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        user(format!("{name}: not UTF-8 at byte {at}"), "give UTF-8 text")
    })
}
