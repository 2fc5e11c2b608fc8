//! Old spellings, and the command to type instead.

use std::path::Path;

use clap::Command;

/// Options of every command that are followed by a value.
const VALUED: [&str; 2] = ["--color", "--threads"];

/// The error and the hint for words that were a command before `bench` and `report` had commands of their own. `words` follow
/// the program's name.
pub fn moved(words: &[String], declared: &Command) -> Option<(String, String)> {
    let at = next_word(words, 0)?;
    let command = declared.find_subcommand(&words[at])?;
    if words[at] == "eval" {
        return results_file(words);
    }
    let first = &words[next_word(words, at + 1)?];
    let help = ["help", "--help", "-h"].contains(&first.as_str());
    if help || command.find_subcommand(first).is_some() {
        return None;
    }
    let rest = &words[at + 1..];
    let (subcommand, rest) = match words[at].as_str() {
        "bench" if first.starts_with('-') => bench(rest),
        "report" if first.starts_with('-') || is_path(first) => (report(rest), rest.to_vec()),
        _ => return None,
    };
    let typed = ["still"].into_iter().chain(words[..=at].iter().map(String::as_str));
    let now = typed.chain([subcommand]).chain(rest.iter().map(String::as_str));
    // A word with a NUL cannot have come from a shell.
    let now = shlex::try_join(now).ok()?;
    let names: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
    Some((
        format!("`still {}` is followed by one of {}", words[at], names.join(", ")),
        format!("type `{now}`"),
    ))
}

/// `still eval --json FILE` wrote the results that `--out FILE` writes.
fn results_file(words: &[String]) -> Option<(String, String)> {
    let mut now = words.to_vec();
    let json = words.iter().enumerate().find(|(n, word)| {
        let followed = words.get(n + 1).is_some_and(|next| !next.starts_with('-'));
        is_set(word, "--json") || *word == "--json" && followed
    });
    let (n, word) = json?;
    let file = word.strip_prefix("--json=").map(str::to_owned);
    now.splice(n..=n, std::iter::once("--out".to_owned()).chain(file));
    let now = shlex::try_join(["still"].into_iter().chain(now.iter().map(String::as_str))).ok()?;
    Some(("--json takes no file: it prints the results".into(), format!("type `{now}`")))
}

/// The first word from `from` on that is neither an option of every command nor such an option's value.
fn next_word(words: &[String], from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(word) = words.get(at).map(String::as_str) {
        let counted =
            word.strip_prefix("-v").is_some_and(|more| more.bytes().all(|byte| byte == b'v'));
        match word {
            _ if VALUED.contains(&word) => at += 2,
            "-q" | "--quiet" | "--verbose" => at += 1,
            _ if counted || VALUED.iter().any(|name| is_set(word, name)) => at += 1,
            _ => return Some(at),
        }
    }
    None
}

/// Whether a word is `NAME=VALUE`.
fn is_set(word: &str, name: &str) -> bool {
    word.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))
}

/// `--op attention` and `--stages` said what was timed; without them it was a model.
fn bench(words: &[String]) -> (&'static str, Vec<String>) {
    let has = |name: &str| words.iter().any(|word| word == name || is_set(word, name));
    if !has("--op") {
        return (if has("--stages") { "train" } else { "model" }, words.to_vec());
    }
    let mut rest = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--op" => drop(words.next()),
            word if is_set(word, "--op") => {}
            word => rest.push(word.to_owned()),
        }
    }
    ("attention", rest)
}

/// One path that is no file was a run; files were results.
fn report(words: &[String]) -> &'static str {
    const VALUED_HERE: [&str; 3] = ["--out", "-o", "--markdown"];
    let mut paths = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            word if VALUED.contains(&word) || VALUED_HERE.contains(&word) => drop(words.next()),
            word if word.starts_with('-') => {}
            word => paths.push(Path::new(word)),
        }
    }
    match paths.as_slice() {
        [path] if !path.is_file() => "run",
        _ => "eval",
    }
}

/// Whether a word is a path rather than a misspelt command.
fn is_path(word: &str) -> bool {
    word.contains(['/', '.']) || Path::new(word).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command;

    fn told(line: &str) -> Option<(String, String)> {
        let words = shlex::split(line).unwrap();
        moved(&words[1..], &command())
    }

    #[test]
    fn old_spellings_say_what_to_type() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        for (old, new) in [
            ("still bench --model m", "still bench model --model m"),
            ("still -q bench -m 'a b' --json", "still -q bench model -m 'a b' --json"),
            ("still bench --threads 2 -m x", "still bench model --threads 2 -m x"),
            ("still bench --op attention --device cuda", "still bench attention --device cuda"),
            ("still bench --batch 2 --op=attention", "still bench attention --batch 2"),
            (
                "still bench --shape x --stages finetune --steps 3",
                "still bench train --shape x --stages finetune --steps 3",
            ),
            ("still report my.run", "still report run my.run"),
            (
                "still report -q --out page.html my.run",
                "still report run -q --out page.html my.run",
            ),
            ("still report a.json b.json", "still report eval a.json b.json"),
            (
                &format!("still report {file} --markdown t.md"),
                &format!("still report eval {file} --markdown t.md"),
            ),
        ] {
            let (message, hint) = told(old).unwrap_or_else(|| panic!("{old}"));
            assert_eq!(hint, format!("type `{new}`"), "{old}");
            assert!(message.contains("is followed by one of"), "{message}");
        }
    }

    #[test]
    fn results_are_written_by_out() {
        for (old, new) in [
            ("still eval -m x -t piqa --json r.json", "still eval -m x -t piqa --out r.json"),
            ("still eval --json=r.json -m x", "still eval --out r.json -m x"),
        ] {
            let (message, hint) = told(old).unwrap();
            assert!(message.contains("--json takes no file"), "{message}");
            assert_eq!(hint, format!("type `{new}`"));
        }
        assert_eq!(told("still eval -m x --json --no-such"), None);
    }

    #[test]
    fn other_words_are_not_taken_for_old_spellings() {
        for line in [
            "still",
            "still bench",
            "still bench -q",
            "still bench --help",
            "still bench model --shape no-such",
            "still bench -vv attention --no-such",
            "still bench modle",
            "still report",
            "still report run missing.run",
            "still report --color never eval missing.json",
            "still report rn",
            "still eval --op attention",
            "still bnch --op attention",
        ] {
            assert_eq!(told(line), None, "{line}");
        }
    }
}
