//! Texts and data that a command reads.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::Path;

use anyhow::Context;
use still_model::files;

use crate::errors::user;
use crate::printer::Printer;

/// What some programs write before UTF-8: no part of a text.
const MARK: &str = "\u{feff}";

/// Reads a text file.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes = files::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    decoded(bytes, &path.display().to_string())
}

/// Reads a document, as [`read_text_once`] does. It has the line ends that models know, whatever system wrote it.
pub fn read_document(path: &Path, printer: &Printer) -> anyhow::Result<String> {
    Ok(unix_lines(read_text_once(path, printer)?))
}

/// A text with the line ends of Unix.
pub fn unix_lines(text: String) -> String {
    if text.contains("\r\n") { text.replace("\r\n", "\n") } else { text }
}

/// UTF-8 as text, without its byte order mark.
fn decoded(bytes: Vec<u8>, name: &str) -> anyhow::Result<String> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let is_utf16 = matches!(error.as_bytes(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]);
        let hint = if is_utf16 {
            "it looks like UTF-16: convert it to UTF-8, such as with `iconv -f UTF-16 -t UTF-8`"
        } else {
            "give UTF-8 text: convert it if it is text of another encoding"
        };
        user(format!("{name}: not UTF-8 at byte {at}"), hint)
    })?;
    if text.starts_with(MARK) {
        text.drain(..MARK.len());
    }
    Ok(text)
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
    decoded(bytes, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_the_same_from_every_system() {
        let file = |bytes: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            read_text(file.path())
        };
        let unix = "One line.\nAnother.\n";
        let windows = format!("{MARK}{}", unix.replace('\n', "\r\n"));
        assert_eq!(unix_lines(file(windows.as_bytes()).unwrap()), unix);
        assert_eq!(unix_lines(read_piped(windows.as_bytes(), "a pipe").unwrap()), unix);
        // A mark within a text is a character.
        assert_eq!(file(b"a\xef\xbb\xbfb").unwrap(), "a\u{feff}b");
        let utf16: Vec<u8> = "\u{feff}One".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (bytes, hint) in [(utf16.as_slice(), "UTF-16"), (b"K\xf6ln", "another encoding")] {
            let told = crate::errors::describe(&file(bytes).unwrap_err());
            assert!(told.message.contains("not UTF-8 at byte "), "{told:?}");
            assert!(told.hint.contains(hint), "{told:?}");
        }
    }
}
