//! The base of a delta: how it is recorded, found again and recognized.

use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use super::built_in::PINNED_BASE;
use super::form::BASE_KEY;
use super::safetensors_dir::in_file;
use super::{Checkpoint, OnFetch};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::fetch::DEMO_SHA256;
use crate::model::Model;

/// Keys that change no value that a model computes within its context.
const NO_ARITHMETIC: [&str; 4] =
    ["architectures", "bos_token_id", "eos_token_id", "max_position_embeddings"];

/// What a delta in `dir` records of its base: the absolute path or hub id, the path from the delta to it, the hash of its weights.
/// Its configuration is recorded as every student's is.
///
/// # Errors
/// A base that was made in memory; an unreadable file.
pub(super) fn record(dir: &Path, model: &Model) -> Result<Value> {
    if model.base.files.is_empty() {
        return Err(ModelError::Invalid(
            "a delta needs a base on disk; this model was made in memory".into(),
        ));
    }
    let mut record = json!({ "source": model.base.source, "sha256": model.base.sha256()? });
    if model.base.source == PINNED_BASE {
        return Ok(record);
    }
    if let Ok(base) = Path::new(&model.base.source).canonicalize() {
        record["source"] = json!(base.to_string_lossy());
        if let Some(path) = real(dir).and_then(|dir| relative(&dir, &base)) {
            record["path"] = json!(path.to_string_lossy());
        }
    }
    Ok(record)
}

/// A directory's real path, though it may not be there yet.
fn real(dir: &Path) -> Option<PathBuf> {
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    Some(parent.unwrap_or(".".as_ref()).canonicalize().ok()?.join(dir.file_name()?))
}

/// The way from one directory to a path, both absolute; none between two drives.
fn relative(from: &Path, to: &Path) -> Option<PathBuf> {
    let (from, to): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    if common == 0 {
        return None;
    }
    let up = from[common..].iter().map(|_| Component::ParentDir);
    Some(up.chain(to[common..].iter().copied()).collect())
}

/// Opens the base that `record`, in the file `path` of the directory `dir`, describes: where it is as seen from the delta, where
/// it was, or on the hub. The first one of the recorded weights and configuration is it. An older delta has no `config`.
///
/// # Errors
/// No such base; every place that was tried is named.
pub(super) fn open_base(
    dir: &Path,
    path: &Path,
    record: &Value,
    config: Option<&Value>,
    on_fetch: &OnFetch,
) -> Result<Checkpoint> {
    let text = |key: &str| {
        record[key]
            .as_str()
            .ok_or_else(|| ModelError::corrupt(path, format!("{BASE_KEY}.{key} is missing")))
    };
    let (recorded, sha256) = (text("source")?, text("sha256")?);
    let config =
        config.map(ModelConfig::from_hf_json).transpose().map_err(|error| in_file(error, path))?;
    let expected = Expected { sha256, config: config.as_ref() };
    let (mut tried, mut other) = (Vec::new(), false);
    for place in places(dir, record["path"].as_str(), recorded, sha256) {
        // A path from here must not be taken for a hub id.
        if place != recorded && place != PINNED_BASE && !Path::new(&place).exists() {
            tried.push(format!("{place}: not there"));
            continue;
        }
        match open_if_there(&place, &expected, on_fetch) {
            Ok(base) => return Ok(base),
            Err(Miss::Absent(why)) => tried.push(format!("{place}: {why}")),
            Err(Miss::Other(why)) => {
                other = true;
                tried.push(format!("{place}: {why}"));
            }
        }
    }
    let tried = tried.join("; ");
    if other {
        return Err(ModelError::Corrupt {
            path: path.to_path_buf(),
            reason: format!("what is found is not the base of this student. Tried {tried}"),
            hint: format!(
                "this student was trained on other weights: put those back, or edit {BASE_KEY}.source in {}",
                path.display()
            ),
        });
    }
    Err(ModelError::NotFound {
        what: format!(
            "{}: the base of this student could not be opened. Tried {tried}",
            path.display()
        ),
        hint: format!(
            "put the base back at {recorded}, or edit {BASE_KEY}.source in {}",
            path.display()
        ),
    })
}

/// Where a base may be, likeliest first: next to the delta, then where it was or on the hub, and the pinned base where it is that.
fn places(dir: &Path, path: Option<&str>, recorded: &str, sha256: &str) -> Vec<String> {
    let from_here = |path: &str| dir.join(path).to_string_lossy().into_owned();
    let mut places: Vec<String> = path.map(from_here).into_iter().collect();
    // A path that was written by hand is more likely meant from here than from wherever the program was started.
    if Path::new(recorded).is_relative() && dir.join(recorded).exists() {
        places.push(from_here(recorded));
    }
    places.push(recorded.to_owned());
    if sha256 == DEMO_SHA256 {
        places.push(PINNED_BASE.to_owned());
    }
    places.dedup();
    places
}

struct Expected<'a> {
    sha256: &'a str,
    config: Option<&'a ModelConfig>,
}

/// Why a place does not have the base.
enum Miss {
    /// There is nothing that can be opened.
    Absent(String),
    /// It is another one.
    Other(String),
}

fn open_if_there(
    place: &str,
    expected: &Expected<'_>,
    on_fetch: &OnFetch,
) -> std::result::Result<Checkpoint, Miss> {
    let absent = |error: ModelError| Miss::Absent(error.to_string());
    let base = Checkpoint::open_base(place, on_fetch).map_err(absent)?;
    let mut sha256 = base.base.sha256().map_err(absent)?;
    if sha256 != expected.sha256 {
        // Nothing is refused by what is only remembered.
        sha256 = base.base.sha256_of_bytes().map_err(absent)?;
    }
    if sha256 != expected.sha256 {
        let why = format!("another one: sha256 {sha256}, expected {}", expected.sha256);
        return Err(Miss::Other(why));
    }
    let differing = expected.config.map(|config| differing(config, &base.config));
    match differing {
        Some(keys) if !keys.is_empty() => Err(Miss::Other(format!(
            "the weights are its own, but its configuration has changed: {}",
            keys.join(", ")
        ))),
        _ => Ok(base),
    }
}

/// What of two configurations leads to other values, key by key.
fn differing(recorded: &ModelConfig, found: &ModelConfig) -> Vec<String> {
    let (recorded, found) = (recorded.to_hf_json(), found.to_hf_json());
    let keys = [&recorded, &found].into_iter().filter_map(Value::as_object);
    let mut keys: Vec<&String> = keys.flat_map(|object| object.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
        .filter(|key| !NO_ARITHMETIC.contains(&key.as_str()))
        .filter(|key| recorded.get(*key) != found.get(*key))
        .map(|key| format!("{key} {}, recorded {}", found[key], recorded[key]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A delta of the pinned base opens wherever that was when it was saved.
    #[test]
    fn the_pinned_base_is_known_by_its_hash() {
        let dir = Path::new("/a/delta");
        let places = |sha256| places(dir, Some("../base.gguf"), "/gone/base.gguf", sha256);
        assert_eq!(places("0"), ["/a/delta/../base.gguf", "/gone/base.gguf"]);
        assert_eq!(places(DEMO_SHA256)[2], PINNED_BASE);
        assert_eq!(super::places(dir, None, PINNED_BASE, DEMO_SHA256), [PINNED_BASE]);
    }

    #[test]
    fn ways_from_one_directory_to_another() {
        for (from, to, way) in [
            ("/a/b/student", "/a/b/base", "../base"),
            ("/a/b/student", "/a/base.gguf", "../../base.gguf"),
            ("/a/student", "/b/c", "../../b/c"),
            ("/a", "/a/base", "base"),
        ] {
            assert_eq!(relative(from.as_ref(), to.as_ref()), Some(way.into()), "{from} to {to}");
        }
        assert_eq!(relative("a".as_ref(), "b".as_ref()), None);
    }
}
