//! Models that are known by a name alone: students that ship in the program, and the base that it pins.
//!
//! | name | model |
//! |---|---|
//! | `smollm2-135m-instruct` | the pinned base, fetched when it is first asked for ([`crate::fetch`]) |
//! | `smollm2-135m-instruct-10`, `demo` | its student with a tenth of the dense cache, a delta in the program |

use std::path::{Path, PathBuf};

use super::source::Source;
use crate::error::{ModelError, Result};
use crate::fetch;
use crate::files;

/// The name of the pinned base.
pub const PINNED_BASE: &str = "smollm2-135m-instruct";
/// The student that `still demo` shows.
pub const DEMO_STUDENT: &str = "demo";

/// A delta in the program.
struct BuiltIn {
    name: &'static str,
    /// Another name for it.
    alias: &'static str,
    /// Names and bytes.
    files: &'static [(&'static str, &'static [u8])],
}

macro_rules! student {
    ($name:literal, $alias:literal) => {
        BuiltIn {
            name: $name,
            alias: $alias,
            files: &[
                ("config.json", include_bytes!(concat!("../../students/", $name, "/config.json"))),
                (
                    "student.safetensors",
                    include_bytes!(concat!("../../students/", $name, "/student.safetensors")),
                ),
            ],
        }
    };
}

const STUDENTS: [BuiltIn; 1] = [student!("smollm2-135m-instruct-10", "demo")];

/// Whether a name is that of a built-in model, and no model of that name lies in the working directory.
pub fn is_built_in(model: &str) -> bool {
    !is_a_model(Path::new(model)) && (model == PINNED_BASE || student(model).is_some())
}

/// Names of the models that are built in, the base first.
pub fn built_in_names() -> Vec<&'static str> {
    std::iter::once(PINNED_BASE).chain(STUDENTS.iter().map(|student| student.name)).collect()
}

/// The files of a built-in model. A base is fetched, a student unpacked into the user's cache directory.
///
/// # Errors
/// A base that cannot be fetched; a cache that cannot be written.
pub(super) fn resolve(model: &str) -> Result<Option<Source>> {
    if !is_built_in(model) {
        return Ok(None);
    }
    if model == PINNED_BASE {
        let path = fetch::demo_model(&mut |line| tracing::info!("{line}"))?;
        return Ok(Some(Source::Gguf(path)));
    }
    match student(model) {
        Some(student) => {
            Ok(Some(Source::Directory(unpacked(student, &fetch::cache_dir()?.join("students"))?)))
        }
        None => Ok(None),
    }
}

fn student(model: &str) -> Option<&'static BuiltIn> {
    STUDENTS.iter().find(|student| student.name == model || student.alias == model)
}

/// A directory of the user's with a built-in model's name is asked for only if it is a model.
fn is_a_model(path: &Path) -> bool {
    path.join("config.json").exists()
}

/// The directory of a student below `parent`, its files written where they are missing or others. The name has a digest of
/// them, so that versions of the program do not write over each other's.
fn unpacked(student: &BuiltIn, parent: &Path) -> Result<PathBuf> {
    let mut hasher = blake3::Hasher::new();
    for (name, bytes) in student.files {
        hasher.update(name.as_bytes()).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
    let digest = hasher.finalize().to_hex();
    let dir = parent.join(format!("{}-{}", student.name, &digest[..16]));
    for &(name, bytes) in student.files {
        let path = dir.join(name);
        if files::read(&path).is_ok_and(|there| there == bytes) {
            continue;
        }
        std::fs::create_dir_all(&dir).map_err(ModelError::write(&dir))?;
        files::write_file(&path, bytes).map_err(ModelError::write(&path))?;
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: BuiltIn = BuiltIn {
        name: "two",
        alias: "2",
        files: &[("config.json", b"{}"), ("student.safetensors", b"tensors")],
    };

    #[test]
    fn files_are_unpacked_once_and_mended() {
        let cache = tempfile::tempdir().unwrap();
        let dir = unpacked(&TWO, cache.path()).unwrap();
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(
            (read("config.json"), read("student.safetensors")),
            (b"{}".to_vec(), b"tensors".to_vec())
        );
        let written = || std::fs::metadata(dir.join("config.json")).unwrap().modified().unwrap();
        let before = written();
        std::fs::write(dir.join("student.safetensors"), "damaged").unwrap();
        assert_eq!(unpacked(&TWO, cache.path()).unwrap(), dir);
        assert_eq!(read("student.safetensors"), b"tensors");
        assert_eq!(written(), before, "what is whole is not written again");
        let other = BuiltIn { files: &[("config.json", b"[]")], ..TWO };
        assert_ne!(unpacked(&other, cache.path()).unwrap(), dir);
        let file = cache.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(unpacked(&TWO, &file).is_err());
    }

    /// What ships is a delta of the pinned base, of the size that a repository and a package take.
    #[test]
    fn students_are_deltas_of_the_pinned_base() {
        for student in &STUDENTS {
            let file = |name| student.files.iter().find(|(file, _)| *file == name).unwrap().1;
            let config: serde_json::Value = serde_json::from_slice(file("config.json")).unwrap();
            assert_eq!(config["still_base"]["source"], PINNED_BASE, "{}", student.name);
            assert_eq!(config["still_base"]["sha256"], fetch::DEMO_SHA256);
            assert!(config["still_base"].get("path").is_none());
            assert!(file("student.safetensors").len() <= 6 << 20);
            assert!(is_built_in(student.name) && is_built_in(student.alias));
        }
        assert!(is_built_in(PINNED_BASE) && !is_built_in("org/name"));
    }
}
