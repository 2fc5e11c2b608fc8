//! What clap has to say: help and version as results, usage errors in the two lines of all other errors.

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::args::Color;
use crate::errors::{EXIT_USER, stdout_ended};
use crate::printer::Printer;

/// Prints it and returns the exit code.
pub fn report(error: &clap::Error) -> ExitCode {
    let printer = Printer::new(false, 0, Color::Auto);
    if !error.use_stderr() {
        return match printer.help(&error.render()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => stdout_ended(&printer, &error),
        };
    }
    let (message, hint) = lines(error);
    printer.error(&message, Some(&hint));
    ExitCode::from(EXIT_USER)
}

fn lines(error: &clap::Error) -> (String, String) {
    let text = error.to_string();
    // The first paragraph says what is wrong, tips follow, then usage.
    let mut paragraphs = text.split("\n\n");
    let first = paragraphs.next().unwrap_or_default();
    let mut message = String::new();
    let mut hints = Vec::new();
    for line in first.lines().map(str::trim) {
        match line.strip_prefix("[possible values: ").and_then(|rest| rest.strip_suffix(']')) {
            Some(values) => hints.push(format!("use one of {values}")),
            None => {
                let space = if message.is_empty() { "" } else { " " };
                message += &format!("{space}{}", line.trim_start_matches("error: "));
            }
        }
    }
    let tips = text.lines().filter_map(|line| line.trim().strip_prefix("tip: "));
    hints.extend(tips.map(str::to_owned));
    let command = asked_command();
    match error.kind() {
        ErrorKind::ValueValidation => {
            // The range that the value is not in is the hint.
            let (name, value) = (argument(error), context(error, ContextKind::InvalidValue));
            if let (Some(name), Some(value)) = (name, value) {
                message = match std::error::Error::source(error) {
                    Some(reason) => format!("{name} {value} is out of range: {reason}"),
                    None => format!("{name} {value} is out of range"),
                };
            }
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            message = "no command is given".into();
            hints = vec![
                "try `still demo`, or `still --help` for all commands; `still COMMAND --help` explains one".into(),
            ];
        }
        _ => {}
    }
    if hints.is_empty() {
        hints.push(format!("`still {command}--help` says what can be given"));
    }
    (message, hints.join("; "))
}

/// `--batch`, of `--batch <N>`.
fn argument(error: &clap::Error) -> Option<String> {
    let name = context(error, ContextKind::InvalidArg)?;
    name.split(['<', ' ']).next().map(str::to_owned)
}

fn context(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text.clone()),
        ContextValue::Strings(texts) => texts.first().cloned(),
        _ => None,
    }
}

/// The first word that names a command, and a space; nothing if there is none.
fn asked_command() -> String {
    use clap::CommandFactory;
    let declared = crate::args::Cli::command();
    let mut words = std::env::args_os().skip(1).filter_map(|word| word.into_string().ok());
    words
        .find(|word| declared.find_subcommand(word).is_some())
        .map_or_else(String::new, |word| word + " ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::lines;
    use crate::args::Cli;

    fn told(arguments: &[&str]) -> (String, String) {
        lines(&Cli::try_parse_from([&["still"], arguments].concat()).unwrap_err())
    }

    #[test]
    fn every_kind_is_two_lines() {
        for (arguments, message, hint) in [
            (vec!["generat"], "unrecognized subcommand 'generat'", "'generate'"),
            (vec!["generate"], "not provided: --model <MODEL>", "--help"),
            (vec!["doctor", "--jsn"], "unexpected argument '--jsn' found", "'--json'"),
            (vec!["doctor", "x"], "unexpected argument 'x' found", "--help"),
            (vec!["doctor", "--color", "blue"], "'blue' for '--color", "auto, always, never"),
            (vec!["doctor", "-q", "-v"], "cannot be used with", "--help"),
            (vec!["generate", "--model"], "a value is required for '--model", "--help"),
            (vec!["generate", "-m", "x", "-n", "-4"], "--max-new-tokens -4 is out of range", ""),
            (vec!["generate", "-m", "x", "-n", "4x"], "--max-new-tokens 4x is out of range", ""),
            (vec!["generate", "-m", "x", "-n", "99999999999999999999"], "from 0 to ", ""),
            (vec!["bench", "-m", "x", "--batch", "1000000000000"], "from 0 to 65536", ""),
            (vec![], "no command is given", "still --help"),
        ] {
            let told = told(&arguments);
            assert!(told.0.contains(message), "{arguments:?}: {told:?}");
            assert!(told.1.contains(hint) && !told.1.is_empty(), "{arguments:?}: {told:?}");
            assert!(!told.0.contains('\n') && !told.1.contains('\n'), "{told:?}");
            assert!(!told.0.contains("Usage") && !told.1.contains("Usage"), "{told:?}");
        }
    }
}
