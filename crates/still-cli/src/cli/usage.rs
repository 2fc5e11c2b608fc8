//! Output of clap: help and version as results, usage errors in the two lines of all other errors.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::command;
use super::moved::moved;
use crate::errors::{EXIT_DONE, EXIT_USER, stdout_ended};
use crate::printer::{Color, Printer};

const TRY: &str =
    "try `still demo`, or `still --help` for all commands; `still COMMAND --help` explains one";

/// Prints it and returns the exit code. `arguments`: the whole command line.
pub fn report(error: &clap::Error, arguments: &[OsString]) -> u8 {
    let printer = Printer::new(false, 0, Color::Auto);
    if !error.use_stderr() {
        return match printer.help(&error.render()) {
            Ok(()) => EXIT_DONE,
            Err(error) => stdout_ended(&printer, &error),
        };
    }
    let words: Vec<String> =
        arguments.iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let declared = command();
    let (message, hint) = moved(&words, &declared).unwrap_or_else(|| lines(error, &words));
    printer.error(&message, Some(&hint));
    EXIT_USER
}

/// The error and its hint. `words` follow the program's name.
fn lines(error: &clap::Error, words: &[String]) -> (String, String) {
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
    // Who mistypes an option means an option, not a value that looks like one.
    hints.extend(tips.filter(|tip| !tip.starts_with("to pass ")).map(str::to_owned));
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
            (message, hints) = match asked_command(words).trim_end() {
                "" => ("no command is given".into(), vec![TRY.into()]),
                asked => (
                    format!("no command is given to `still {asked}`"),
                    vec![format!("`still {asked} --help` explains {}", commands_of(words))],
                ),
            };
        }
        ErrorKind::InvalidSubcommand if hints.is_empty() => {
            let path = asked_command(words);
            hints.push(format!("`still {path}--help` explains {}", commands_of(words)));
        }
        ErrorKind::MissingRequiredArgument => {
            let path = asked_command(words);
            let help = format!("`still {path}--help` explains what can be given");
            hints.push(match example(&asked(words).1, words) {
                Some(example) => format!("such as `{example}`; {help}"),
                None => help,
            });
        }
        _ => {}
    }
    if hints.is_empty() {
        hints.push(format!("`still {}--help` says what can be given", asked_command(words)));
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

/// The words that name a command and a command of it, each with a space; nothing if there are none.
fn asked_command(words: &[String]) -> String {
    asked(words).0
}

/// [`asked_command`], and how that command is declared.
fn asked(words: &[String]) -> (String, clap::Command) {
    let mut declared = command();
    let mut path = String::new();
    for word in words {
        if let Some(found) = declared.find_subcommand(word) {
            path += &format!("{word} ");
            declared = found.clone();
        }
    }
    (path, declared)
}

/// The names of the commands of what was asked for: `list, show`.
fn commands_of(words: &[String]) -> String {
    let declared = asked(words).1;
    let names: Vec<&str> = declared.get_subcommands().map(clap::Command::get_name).collect();
    names.join(", ")
}

/// Columns of an example that stands in one row of a hint.
const SHORT: usize = 68;

/// The example of a command's help that has the most of the options that were given, short ones first.
fn example(declared: &clap::Command, words: &[String]) -> Option<String> {
    let help = declared.get_after_help()?.to_string();
    let (_, examples) = help.split_once("Examples:\n")?;
    let mut examples: Vec<&str> =
        examples.lines().map_while(|line| line.strip_prefix("  ")).collect();
    examples.sort_by_key(|example| example.len() > SHORT);
    let has = |example: &str| {
        let given = words.iter().filter(|word| word.starts_with("--"));
        given.filter(|&option| example.split(' ').any(|word| word == option)).count()
    };
    let most = examples.iter().map(|example| has(example)).max()?;
    examples.into_iter().find(|example| has(example) == most).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::lines;
    use crate::cli::{Cli, command};

    fn told(arguments: &[&str]) -> (String, String) {
        let words: Vec<String> = arguments.iter().map(|&word| word.into()).collect();
        let line = std::iter::once("still").chain(arguments.iter().copied());
        lines(&Cli::read(line.map(Into::into)).unwrap_err(), &words)
    }

    #[test]
    fn every_command_tells_what_it_does_not_know_in_two_lines() {
        let mut commands = Vec::new();
        crate::cli::leaves(&command(), "still", &mut commands);
        assert!(commands.len() > 18);
        for (path, _) in commands {
            let mut words: Vec<&str> = path.split(' ').skip(1).collect();
            words.push("--no-such-option");
            let (message, hint) = told(&words);
            assert_eq!(message, "unexpected argument '--no-such-option' found", "{path}");
            assert!(!hint.is_empty() && !hint.contains(['\n', '\u{1b}']), "{path}: {hint}");
        }
    }

    #[test]
    fn every_kind_is_two_lines() {
        for (arguments, message, hint) in [
            (vec!["generat"], "unrecognized subcommand 'generat'", "'generate'"),
            (vec!["generate"], "not provided: --model <MODEL>", "--help"),
            (vec!["ask", "-m", "x"], "not provided: <QUESTION>", "such as `still ask --model "),
            (
                vec!["export", "--model", "x", "--out", "y"],
                "--gguf",
                "`still export --model my-student --gguf ",
            ),
            (vec!["recipes"], "no command is given to `still recipes`", "explains list, show"),
            (vec!["aks"], "unrecognized subcommand 'aks'", "explains demo, linearize, "),
            (vec!["doctor", "--jsn"], "unexpected argument '--jsn' found", "'--json'"),
            (vec!["doctor", "x"], "unexpected argument 'x' found", "--help"),
            (vec!["doctor", "--color", "blue"], "'blue' for '--color", "auto, always, never"),
            (vec!["doctor", "-q", "-v"], "cannot be used with", "--help"),
            (vec!["generate", "--model"], "a value is required for '--model", "--help"),
            (vec!["generate", "-m", "x", "-n", "-4"], "--max-new-tokens -4 is out of range", ""),
            (vec!["bench", "train", "-m", "x", "--steps", "-4"], "--steps -4 is out of range", ""),
            (vec!["report", "run", "-4"], "unexpected argument '-4'", ""),
            (vec!["generate", "-m", "x", "-n", "4x"], "--max-new-tokens 4x is out of range", ""),
            (vec!["generate", "-m", "x", "-n", "99999999999999999999"], "from 0 to ", ""),
            (vec!["bench", "model", "-m", "x", "--batch", "1000000000000"], "from 0 to 65536", ""),
            (
                vec!["report", "run", "x", "--html", "y"],
                "'--html' found",
                "still report run --help",
            ),
            (vec!["bench", "modle"], "unrecognized subcommand 'modle'", "'model'"),
            (vec!["bench", "train"], "not provided", "still bench train --help"),
            (vec!["report"], "no command is given to `still report`", "still report --help"),
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
