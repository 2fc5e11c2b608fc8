//! Slash commands.

use std::path::PathBuf;

use crate::errors::user;

/// All commands, as `/help` lists them.
pub const HELP: &str = "\
/file FILE      read a document; the next message is about it
/system TEXT    change the system message; /system alone takes it away
/clear          forget the conversation, not the system message
/stats          tokens, the cache compared with a dense one, speed, sampling
/save [FILE]    keep the conversation in a file (without FILE: in --session's)
/load FILE      go on with a conversation that was saved
/quit           end the chat; so do Ctrl-D, and Ctrl-C twice

A line that ends with \\ goes on in the next. Pasted lines are one message.
Arrow keys recall what was typed; Ctrl-R searches it. Tab completes commands
and file names. A message that begins with a space may begin with a slash.";

/// The words that [`HELP`] explains.
pub const WORDS: [&str; 8] =
    ["/help", "/file ", "/system ", "/clear", "/stats", "/save ", "/load ", "/quit"];

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Lists commands.
    Help,
    /// Reads a document.
    File(PathBuf),
    /// Changes the system message.
    System(Option<String>),
    /// Forgets the conversation.
    Clear,
    /// Tells about the session.
    Stats,
    /// Keeps the conversation, in the session's own file without a path.
    Save(Option<PathBuf>),
    /// Goes on with another conversation.
    Load(PathBuf),
    /// Ends the chat.
    Quit,
}

impl Command {
    /// The command that a line is, or what is wrong with it; nothing if it is a message.
    pub fn parse(line: &str) -> Option<anyhow::Result<Self>> {
        let rest = line.strip_prefix('/')?;
        let (word, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let rest = rest.trim();
        // What was pasted begins as it may: a path, a comment. A system message alone has lines.
        if word != "system" && line.trim_end().contains('\n') {
            return None;
        }
        let path = || unquoted(rest);
        Some(match (word, rest.is_empty()) {
            ("help" | "?", true) => Ok(Self::Help),
            ("file", false) => Ok(Self::File(path())),
            ("system", empty) => Ok(Self::System((!empty).then(|| rest.to_owned()))),
            ("clear", true) => Ok(Self::Clear),
            ("stats", true) => Ok(Self::Stats),
            ("save", empty) => Ok(Self::Save((!empty).then(path))),
            ("load", false) => Ok(Self::Load(path())),
            ("quit" | "exit" | "bye", true) => Ok(Self::Quit),
            ("file" | "load", true) => {
                Err(user(format!("/{word} needs a file"), format!("type /{word} FILE")))
            }
            ("help" | "?" | "clear" | "stats" | "quit" | "exit" | "bye", false) => {
                Err(user(format!("/{word} takes nothing more"), format!("type /{word} alone")))
            }
            _ => Err(user(
                format!("there is no command /{word}"),
                "/help lists commands; a message may begin with a space and a slash",
            )),
        })
    }
}

/// A path as a shell would take it: completion escapes spaces.
fn unquoted(path: &str) -> PathBuf {
    match shlex::split(path).as_deref() {
        Some([one]) => one.into(),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Result<Command, String>> {
        Command::parse(line).map(|parsed| parsed.map_err(|error| error.to_string()))
    }

    #[test]
    fn lines_are_commands_or_messages() {
        for message in ["hello", " /help", "", "a /file b", "/help me\nwith this", "/* a\n b */"] {
            assert_eq!(parsed(message), None, "{message:?}");
        }
        let file = |path: &str| Some(Ok(Command::File(path.into())));
        assert_eq!(parsed("/file report.txt "), file("report.txt"));
        assert_eq!(parsed(r"/file my\ report.txt"), file("my report.txt"));
        assert_eq!(parsed("/file 'my report.txt'"), file("my report.txt"));
        assert_eq!(parsed("/file my report.txt"), file("my report.txt"));
        assert_eq!(parsed("/system"), Some(Ok(Command::System(None))));
        let brief = Some("Be brief,\nplease.".into());
        assert_eq!(parsed("/system Be brief,\nplease."), Some(Ok(Command::System(brief))));
        assert_eq!(parsed("/save"), Some(Ok(Command::Save(None))));
        for end in ["/quit", "/exit", "/bye"] {
            assert_eq!(parsed(end), Some(Ok(Command::Quit)));
        }
    }

    #[test]
    fn what_is_wrong_with_a_command_is_said() {
        for (line, words) in [
            ("/etc/passwd", "no command /etc/passwd"),
            ("/fil a", "no command /fil"),
            ("/file", "/file needs a file"),
            ("/quit now", "/quit takes nothing more"),
        ] {
            let error = parsed(line).unwrap().unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn help_fits_80_columns_and_lists_every_word() {
        assert!(HELP.lines().all(|line| line.chars().count() <= 80));
        for word in WORDS.iter().filter(|word| **word != "/help") {
            let begins = |line: &str| line.starts_with(word.trim());
            assert!(HELP.lines().any(begins), "{word}");
            let parsed = Command::parse(&format!("{word}x"));
            assert!(parsed.is_some(), "{word}");
        }
    }
}
