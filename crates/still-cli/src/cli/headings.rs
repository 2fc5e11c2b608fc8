//! Options under the same headings in every command: one table has the heading of each option.

use clap::{Arg, Command};

/// What options are for, by their names in the code.
const HEADINGS: [(&str, &[&str]); 8] = [
    (
        "Model",
        &["model", "shape", "device", "compute_dtype", "weights", "cache_dtype", "batch_size"],
    ),
    (
        "Server",
        &[
            "host",
            "port",
            "api_key_file",
            "alias",
            "context",
            "max_concurrent",
            "queue",
            "timeout",
            "grace",
            "state_memory",
            "state_store",
            "deterministic",
        ],
    ),
    ("Document and session", &["file", "session", "system", "no_history"]),
    ("Text", &["prompt", "prompt_file", "text", "max_tokens"]),
    ("Data and recipe", &["data", "recipe", "set", "budgets", "budget"]),
    ("Calibration", &["cache_fraction", "rows", "at_length", "tokens", "window", "key_exponents"]),
    (
        "Run",
        &[
            "resume",
            "run_dir",
            "no_tensorboard",
            "training_free",
            "no_verdict",
            "dry_run",
            "train",
            "full",
            "transfer_steps",
            "finetune_steps",
            "windows",
            "keys",
            "decode_steps",
            "contexts",
            "onto",
            "new_tokens",
            "in_turn",
            "separate",
            "variants",
            "batch",
            "cap",
            "stages",
            "steps",
            "passes",
            "repetitions",
            "heads",
            "kv_heads",
            "head_dim",
            "seed",
        ],
    ),
    (
        "Output",
        &["out", "json", "html", "markdown", "overwrite", "gguf", "transformers", "delta", "dtype"],
    ),
];

/// The command with a heading for each option that has none of its own.
pub fn headed(command: Command) -> Command {
    command.mut_args(with_heading).mut_subcommands(headed)
}

fn with_heading(arg: Arg) -> Arg {
    if arg.is_positional() || arg.get_help_heading().is_some() {
        return arg;
    }
    let heading = heading(arg.get_id().as_str());
    match heading {
        Some(heading) => arg.help_heading(heading),
        None => arg,
    }
}

fn heading(id: &str) -> Option<&'static str> {
    HEADINGS.iter().find(|(_, ids)| ids.contains(&id)).map(|&(heading, _)| heading)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::cli::{command, leaves};

    /// Most options below one heading.
    const MOST: usize = 14;

    fn commands() -> Vec<(String, Command)> {
        let mut all = Vec::new();
        leaves(&command(), "still", &mut all);
        all
    }

    fn options(command: &Command) -> impl Iterator<Item = &Arg> {
        command.get_arguments().filter(|arg| !arg.is_positional() && !arg.is_global_set())
    }

    #[test]
    fn every_option_of_every_command_has_a_heading() {
        let mut known = BTreeSet::new();
        for (path, command) in commands() {
            let mut groups: BTreeMap<&str, usize> = BTreeMap::new();
            for option in options(&command) {
                let name = option.get_id().as_str();
                known.insert(name.to_owned());
                let Some(heading) = option.get_help_heading() else {
                    panic!("{path}: --{name} has no heading: add it to HEADINGS");
                };
                *groups.entry(heading).or_default() += 1;
            }
            assert!(groups.values().all(|&count| count <= MOST), "{path}: {groups:?}");
        }
        let listed = HEADINGS.iter().flat_map(|(_, ids)| *ids);
        let stale: Vec<&&str> = listed.filter(|id| !known.contains(**id)).collect();
        assert!(stale.is_empty(), "no command has {stale:?}");
    }

    /// An option that several commands have does one thing.
    #[test]
    fn options_of_one_name_mean_one_thing() {
        let mut count = 0;
        for (path, command) in commands() {
            for option in options(&command) {
                let help = option.get_help().map(ToString::to_string).unwrap_or_default();
                let takes_value = option.get_action().takes_values();
                let as_usual = match option.get_id().as_str() {
                    "json" => !takes_value && help.starts_with("Print one JSON object"),
                    "overwrite" => !takes_value && help == "Replace what is there",
                    "html" => takes_value && help.ends_with("HTML page"),
                    "out" => takes_value && option.get_short() == Some('o'),
                    "resume" => !takes_value,
                    _ => continue,
                };
                count += 1;
                assert!(as_usual, "{path} --{}: {help}", option.get_id());
            }
        }
        assert!(count > 20, "{count}");
    }

    /// Bytes have binary units, speeds are in tokens/s.
    #[test]
    fn help_has_one_system_of_units() {
        for (path, mut command) in commands() {
            let help = command.render_long_help().to_string();
            for unit in [" MB", " GB", " KB", "tok/s", "tokens per second"] {
                assert!(!help.contains(unit), "{path}: {unit:?} in {help}");
            }
        }
    }
}
