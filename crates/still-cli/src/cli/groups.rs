//! `still --help`: the commands in groups.

use std::fmt::Write as _;

use clap::Command;

/// What commands are for, and those that are for it.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Train", &["demo", "linearize", "calibrate", "export"]),
    ("Run", &["ask", "generate", "chat", "serve"]),
    ("Evaluate", &["eval", "bench"]),
    ("Look", &["inspect", "report"]),
    ("Set up", &["recipes", "models", "doctor", "completions", "man"]),
];

/// The command with the subcommands of its help in groups.
pub fn grouped(command: Command) -> Command {
    let heading = command.get_styles().get_header();
    let mut template = String::from("{about-with-newline}\n{usage-heading} {usage}\n");
    let width = GROUPS.iter().flat_map(|(_, names)| *names).map(|name| name.len()).max();
    for (title, names) in GROUPS {
        let _ = write!(template, "\n{heading}{title}:{heading:#}\n");
        for subcommand in names.iter().filter_map(|name| command.find_subcommand(name)) {
            let literal = command.get_styles().get_literal();
            let (name, about) = (subcommand.get_name(), subcommand.get_about());
            let about = about.map(ToString::to_string).unwrap_or_default();
            let pad = width.unwrap_or(0) - name.len();
            let _ = writeln!(template, "  {literal}{name}{literal:#}{:pad$}  {about}", "");
        }
    }
    let _ = write!(template, "\n{heading}Options:{heading:#}\n{{options}}{{after-help}}");
    command.help_template(template)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_one_group() {
        let command = crate::cli::command();
        let mut declared: Vec<&str> =
            command.get_subcommands().map(|subcommand| subcommand.get_name()).collect();
        let mut grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| *names).copied().collect();
        declared.sort_unstable();
        grouped.sort_unstable();
        assert_eq!(declared, grouped);
    }

    #[test]
    fn help_fits_a_terminal_of_80_columns() {
        let help = crate::cli::command().term_width(80).render_help().to_string();
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}
