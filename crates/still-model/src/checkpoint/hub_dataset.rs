//! Datasets of a hub, fetched into its cache.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo};

use super::OnFetch;
use crate::error::{ModelError, Result};

/// Most files that are fetched without being named.
const MOST: usize = 16;

/// The files of a dataset `org/name`, or of what is below `org/name/PATH`, that `wanted` accepts, fetched; those of the training split
/// alone if names say which they are.
///
/// Without a network, what was fetched before is given, which is told (`tracing`).
///
/// # Errors
/// No such dataset, nothing in it that is wanted, more than 16 files, or a file that could not be fetched.
pub fn fetch_dataset(
    name: &str,
    wanted: &dyn Fn(&Path) -> bool,
    on_fetch: &OnFetch,
) -> Result<Vec<PathBuf>> {
    let failed = |what: String, hint: &str| ModelError::NotFound { what, hint: hint.into() };
    let mut parts = name.splitn(3, '/');
    let (org, repository) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let below = parts.next().unwrap_or_default();
    let id = format!("{org}/{repository}");
    let offline = |error: &dyn std::fmt::Display| {
        failed(
            format!("no file {name}, and no dataset of this id could be fetched: {error}"),
            "check the path, or the id and the network; a dataset is named org/name or org/name/FILE",
        )
    };
    let api = ApiBuilder::from_env().with_progress(false).with_retries(0).build();
    let repo = api.map_err(|error| offline(&error))?.dataset(id.clone());
    let names: Vec<String> = match repo.info() {
        Ok(info) => info.siblings.into_iter().map(|sibling| sibling.rfilename).collect(),
        Err(error) => {
            let known = cached(&id);
            if known.is_empty() {
                return Err(offline(&error));
            }
            tracing::warn!("{id}: {error}; going on with the files that were fetched before");
            known
        }
    };
    let is_below = |file: &str| {
        let rest = file.strip_prefix(below);
        below.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let mut files: Vec<&String> =
        names.iter().filter(|file| is_below(file) && wanted(Path::new(file))).collect();
    if files.iter().any(|file| file.contains("train")) {
        files.retain(|file| file.contains("train"));
    }
    files.sort();
    match files.len() {
        0 => {
            let first: Vec<&str> = names.iter().take(8).map(String::as_str).collect();
            return Err(failed(
                format!("{name} has no data files; it has {}", first.join(", ")),
                "name a folder or a file of it as org/name/PATH",
            ));
        }
        1..=MOST => {}
        count => {
            return Err(failed(
                format!("{name} has {count} data files, from {} on", files[0]),
                &format!("name one, or a folder of at most {MOST}: {id}/PATH"),
            ));
        }
    }
    let cache = Cache::from_env().dataset(id.clone());
    let get = |file: &String| {
        on_fetch.get(&cache, &repo, file).map_err(|error| {
            failed(format!("{id}: {file} could not be fetched: {error}"), "check the network")
        })
    };
    files.into_iter().map(get).collect()
}

/// Files of a dataset that are in the hub's cache.
fn cached(id: &str) -> Vec<String> {
    let root = Cache::from_env().path().join(Repo::dataset(id.to_owned()).folder_name());
    let Ok(commit) = std::fs::read_to_string(root.join("refs/main")) else { return Vec::new() };
    let snapshot = root.join("snapshots").join(commit.trim());
    let (mut names, mut directories) = (Vec::new(), vec![snapshot.clone()]);
    while let Some(directory) = directories.pop() {
        for entry in directory.read_dir().into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(path);
            } else if let Ok(name) = path.strip_prefix(&snapshot) {
                names.push(name.to_string_lossy().into_owned());
            }
        }
    }
    names
}
