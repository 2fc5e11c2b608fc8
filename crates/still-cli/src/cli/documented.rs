//! The parser accepts every command in the project's pages, comments and messages.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Cli, command};

/// Every file below `dir` with one of these endings.
fn files(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    for entry in dir.read_dir().unwrap().map(Result::unwrap) {
        let path = entry.path();
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if path.is_dir() && !path.ends_with("target") {
            files(&path, endings, found);
        } else if endings.contains(&ending) {
            found.push(path);
        }
    }
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Pages that tell of today, unlike recorded runs and the changelog.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![project().join("README.md"), project().join("CONTRIBUTING.md")];
    for dir in ["docs", "crates"] {
        files(&project().join(dir), &["md"], &mut pages);
    }
    let notes = fs::read_dir(project().join("benches")).unwrap().map(|file| file.unwrap().path());
    pages.extend(notes.filter(|path| path.extension().is_some_and(|ending| ending == "md")));
    pages
}

/// Lines of code blocks that begin with `still `.
fn lines(page: &str) -> Vec<String> {
    let (mut inside, mut lines) = (false, Vec::new());
    for line in page.replace("\\\n", " ").lines() {
        inside ^= line.starts_with("```");
        if inside && line.starts_with("still ") {
            lines.push(line.to_owned());
        }
    }
    lines
}

#[test]
fn commands_in_code_blocks_are_taken() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for page in pages() {
        for line in lines(&fs::read_to_string(&page).unwrap()) {
            count += 1;
            // `#` begins a comment, and what comes after `>` is the shell's.
            let words = shlex::split(&line).unwrap().into_iter();
            let words = words.take_while(|word| word != ">").map(OsString::from);
            if let Err(error) = Cli::read(words) {
                wrong.push(format!("{}: {line}\n  {error}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 20, "only {count} lines were found");
}

/// Code spans of a text: what stands between backticks, in Markdown, comments and messages alike.
fn spans(text: &str) -> impl Iterator<Item = String> {
    // A span may go over a line's end, where a comment or a string begins again.
    let joined = text
        .lines()
        .map(|line| line.trim().trim_start_matches(['/', '!', '#']))
        .collect::<Vec<_>>();
    let joined = joined.join(" ");
    joined.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>().into_iter()
}

/// Whether the words after `still` name a command, and a command of it where it has some.
fn names_a_command(words: &[&str]) -> bool {
    let root = command();
    let Some(first) =
        words.first().filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
    else {
        return true;
    };
    let Some(found) = root.find_subcommand(first) else { return false };
    match words.get(1) {
        Some(second) if found.has_subcommands() => {
            found.find_subcommand(second).is_some() || *second == "…"
        }
        _ => true,
    }
}

#[test]
fn commands_in_code_spans_are_there() {
    let mut places = pages();
    for dir in ["crates", "recipes", "scripts", "benches"] {
        files(&project().join(dir), &["rs", "toml", "sh", "py"], &mut places);
    }
    // Both spell out what was right before.
    places.retain(|path| !path.ends_with("cli/moved.rs") && !path.ends_with("cli/documented.rs"));
    let mut wrong = Vec::new();
    let mut count = 0;
    for place in places {
        for span in spans(&fs::read_to_string(&place).unwrap()) {
            let Some(rest) = span.strip_prefix("still ") else { continue };
            count += 1;
            let words: Vec<&str> = rest.split_whitespace().collect();
            if !names_a_command(&words) {
                wrong.push(format!("{}: `{span}`", place.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 100, "only {count} spans were found");
}

#[test]
fn an_old_spelling_would_be_found() {
    let text = "/// As `still bench\n    /// --op attention` and `still report eval FILE` do, or `still report FILE`, `still chatt`.\n";
    let wrong = spans(text).filter(|span| {
        let words: Vec<&str> = span.split_whitespace().skip(1).collect();
        !names_a_command(&words)
    });
    let wrong: Vec<String> =
        wrong.map(|span| span.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(wrong, ["still bench --op attention", "still report FILE", "still chatt"]);
    assert_eq!(lines("text\nstill a\n```sh\nstill b \\\n  c\n```\n"), ["still b    c"]);
}
