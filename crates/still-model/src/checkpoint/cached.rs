//! The contents of the caches on the disk, and their sizes.

use std::path::{Path, PathBuf};

use hf_hub::Cache;

use super::built_in::PINNED_BASE;
use crate::error::Result;
use crate::fetch::{DEMO_FILE, cache_dir};

/// The kind of a cached item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CachedKind {
    /// A model of a hub, or one that was fetched for the demo.
    Model,
    /// Texts of a hub.
    Dataset,
    /// Token ids of texts, made again whenever they are needed.
    Tokens,
}

/// An item in a cache.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Cached {
    /// Its kind.
    pub kind: CachedKind,
    /// Its name for `--model` or `--data`; a directory's path for token ids.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes on the disk.
    pub bytes: u64,
}

/// The directory with files that hub ids name.
pub fn hub_cache_dir() -> PathBuf {
    Cache::from_env().path().clone()
}

/// Everything in `still`'s cache and in the hub's, models first, by name.
///
/// # Errors
/// If the system names no cache directory.
pub fn cached() -> Result<Vec<Cached>> {
    let mut found = Vec::new();
    let own = cache_dir()?;
    for path in entries(&own) {
        let is_model = path.extension().is_some_and(|end| end == "gguf") && path.is_file();
        if is_model {
            let name = match path.file_name().is_some_and(|name| name == DEMO_FILE) {
                true => PINNED_BASE.to_owned(),
                false => path.display().to_string(),
            };
            found.push(Cached { kind: CachedKind::Model, name, bytes: bytes(&path), path });
        }
    }
    for path in entries(&hub_cache_dir()) {
        let Some(folder) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let kinds = [("models--", CachedKind::Model), ("datasets--", CachedKind::Dataset)];
        let known =
            kinds.into_iter().find_map(|(start, kind)| Some((folder.strip_prefix(start)?, kind)));
        if let Some((name, kind)) = known {
            let name = name.replacen("--", "/", 1);
            found.push(Cached { kind, name, bytes: bytes(&path), path });
        }
    }
    let tokens = own.join("tokens");
    if tokens.is_dir() {
        let name = tokens.display().to_string();
        found.push(Cached { kind: CachedKind::Tokens, name, bytes: bytes(&tokens), path: tokens });
    }
    found.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    Ok(found)
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = directory.read_dir().into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Bytes of a file, or of all files below a directory. What a link leads to is counted where it is.
fn bytes(path: &Path) -> u64 {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => entries(path).iter().map(|path| bytes(path)).sum(),
        Ok(metadata) if metadata.is_file() => metadata.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_not_counted_twice() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        std::fs::write(dir.path().join("blobs/a"), [0; 100]).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("blobs/a", dir.path().join("link")).unwrap();
        assert_eq!(bytes(dir.path()), 100);
        assert_eq!(bytes(&dir.path().join("none")), 0);
    }
}
