//! The files of `--data`: files, folders, a dataset of a hub, or the demo's text.

use std::path::{Component, Path, PathBuf};

use still_model::{OnFetch, files};
use still_train::{check_data_file, data_files_in, is_data_file};

use crate::books;
use crate::errors::user;

/// The name of the text that comes with the program.
const DEMO: &str = "demo";

const HINT: &str = "give files (.txt, .md, .jsonl, each also with .gz or .zst, .parquet, .bin), folders of them, a dataset \
                    of a hub (org/name), or \"demo\"";

/// The files to read, in the order of what names them; those of a folder by path.
///
/// # Errors
/// What is not there, is no file, or could not be fetched.
pub fn data_files(named: &[PathBuf], on_fetch: &OnFetch) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for name in named {
        match name.metadata() {
            Ok(metadata) if metadata.is_dir() => all.extend(data_files_in(name)?),
            Ok(metadata) => match files::kind(&metadata) {
                Some(kind) => {
                    return Err(user(format!("{} is {kind}, not a file", name.display()), HINT));
                }
                None => {
                    check_data_file(name)?;
                    all.push(name.clone());
                }
            },
            Err(_) if name.as_os_str() == DEMO => all.push(demo_text()?),
            Err(_) => match dataset_id(name) {
                Some(id) => all.extend(still_model::fetch_dataset(id, &is_text, on_fetch)?),
                None => return Err(user(format!("no file {}", name.display()), HINT)),
            },
        }
    }
    Ok(all)
}

/// `org/name`, perhaps with a path below it: no path of this machine looks like that and ends in no kind of file.
fn dataset_id(name: &Path) -> Option<&str> {
    let parts = name.components().count();
    let plain = name.components().all(|part| matches!(part, Component::Normal(_)));
    let file_of_ours = parts == 2 && is_data_file(name);
    (plain && parts >= 2 && !file_of_ours).then(|| name.to_str()).flatten()
}

/// Token ids of a hub's file are of a tokenizer that nobody named.
fn is_text(path: &Path) -> bool {
    is_data_file(path) && path.extension().is_some_and(|end| !end.eq_ignore_ascii_case("bin"))
}

/// The demo's training text as a file of the cache, written once.
fn demo_text() -> anyhow::Result<PathBuf> {
    let path = still_model::fetch::cache_dir()?.join("demo").join("books.txt");
    let is_there = files::read_to_string(&path).is_ok_and(|text| text == books::TRAINING.text);
    if !is_there {
        std::fs::create_dir_all(files::parent(&path))?;
        files::write_file(&path, books::TRAINING.text.as_bytes())?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dataset_is_no_path() {
        let id = |name: &str| dataset_id(Path::new(name)).map(str::to_owned);
        assert_eq!(id("org/name").as_deref(), Some("org/name"));
        assert_eq!(id("org/name/data/a.parquet").as_deref(), Some("org/name/data/a.parquet"));
        for path in ["name", "/org/name", "./org/name", "../a/b", "texts/a.txt", "a.jsonl"] {
            assert_eq!(id(path), None, "{path}");
        }
    }
}
