//! What a file's name says it holds.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use super::documents::data_error;
use super::mark::Unmarked;
use crate::error::{Result, TrainError};

/// Largest window that a file of zstd may ask for, as a power of 2: its own limit unless told otherwise.
const WINDOW_LOG: u32 = 27;

/// The kinds, in words.
const KINDS: &str = ".txt, .md, .jsonl (each also with .gz or .zst), .parquet or .bin";

/// What is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// `.txt`, `.md`: one document.
    Text,
    /// `.jsonl`: one document a line.
    Lines,
    /// `.parquet`: one document a row.
    Rows,
    /// `.bin`: token ids.
    Tokens,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A file's content, and how it is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub content: Content,
    compression: Compression,
}

impl Kind {
    /// The kind of a file.
    ///
    /// # Errors
    /// A name that says nothing that can be read.
    pub fn of(path: &Path) -> Result<Self> {
        Self::named(path).ok_or_else(|| {
            data_error(path, "unknown kind of file".into(), &format!("give {KINDS}"))
        })
    }

    /// The same; `None` where nothing is known of the name.
    pub fn named(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let (name, compression) = match name.as_str() {
            name if name.ends_with(".gz") => (&name[..name.len() - 3], Compression::Gzip),
            name if name.ends_with(".zst") => (&name[..name.len() - 4], Compression::Zstd),
            name => (name, Compression::None),
        };
        let contents = [
            (".txt", Content::Text),
            (".md", Content::Text),
            (".jsonl", Content::Lines),
            (".parquet", Content::Rows),
            (".bin", Content::Tokens),
        ];
        let (_, content) = contents.into_iter().find(|(ending, _)| name.ends_with(ending))?;
        let compressible = matches!(content, Content::Text | Content::Lines);
        (compressible || compression == Compression::None).then_some(Self { content, compression })
    }

    /// Whether each of many documents is JSON, so that a chat template and the name of a field decide its ids.
    pub fn has_fields(self) -> bool {
        matches!(self.content, Content::Lines | Content::Rows)
    }

    /// Opens a file of this kind, decompressed.
    pub fn open(self, path: &Path) -> Result<Box<dyn Read>> {
        let file = open(path)?;
        let bytes: Box<dyn Read> = match self.compression {
            Compression::None => Box::new(file),
            Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::new(file))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::new(file).map_err(TrainError::read(path))?;
                decoder.window_log_max(WINDOW_LOG).map_err(TrainError::read(path))?;
                Box::new(decoder)
            }
        };
        Ok(match self.content {
            Content::Text | Content::Lines => Box::new(Unmarked::new(bytes)),
            Content::Rows | Content::Tokens => bytes,
        })
    }
}

/// Opens a file as it is.
pub(super) fn open(path: &Path) -> Result<File> {
    still_model::files::open(path).map_err(TrainError::read(path))
}

/// Whether [`crate::Windows::read`] knows what a file of this name holds.
pub fn is_data_file(path: &Path) -> bool {
    Kind::named(path).is_some()
}

/// [`is_data_file`] as an error, for who was named a file: before a model is loaded.
///
/// # Errors
/// A name that says nothing that can be read.
pub fn check_data_file(path: &Path) -> Result<()> {
    Kind::of(path).map(drop)
}

/// Every file below a directory that can be read as data, by path. Names that begin with a dot are left out.
///
/// # Errors
/// A directory that cannot be read, or has none.
pub fn data_files_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in directory.read_dir().map_err(TrainError::read(&directory))? {
            let entry = entry.map_err(TrainError::read(&directory))?;
            let (path, hidden) = (entry.path(), entry.file_name().as_encoded_bytes()[0] == b'.');
            // What a link names is read if it is a file: a directory could contain itself.
            let kind = entry.file_type().map_err(TrainError::read(&path))?;
            if hidden {
                continue;
            } else if kind.is_dir() {
                directories.push(path);
            } else if is_data_file(&path) && path.is_file() {
                files.push(path);
            }
        }
    }
    if files.is_empty() {
        let hint = format!("it may have {KINDS}, in folders too");
        return Err(data_error(directory, "no data in this folder".into(), &hint));
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_a_file_holds() {
        let kind =
            |name: &str| Kind::named(Path::new(name)).map(|kind| (kind.content, kind.compression));
        assert_eq!(kind("a/b.txt"), Some((Content::Text, Compression::None)));
        assert_eq!(kind("b.md.gz"), Some((Content::Text, Compression::Gzip)));
        assert_eq!(kind("b.jsonl.zst"), Some((Content::Lines, Compression::Zstd)));
        assert_eq!(kind("b.jsonl.gz"), Some((Content::Lines, Compression::Gzip)));
        assert_eq!(kind("b.parquet"), Some((Content::Rows, Compression::None)));
        assert_eq!(kind("B.TXT"), Some((Content::Text, Compression::None)));
        assert_eq!(kind("b.bin"), Some((Content::Tokens, Compression::None)));
        for other in ["b", "b.gz", "b.bin.gz", "b.parquet.zst", "b.csv", "b.txt.bak"] {
            assert_eq!(kind(other), None, "{other}");
        }
    }

    #[test]
    fn a_folder_gives_its_files_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("deep/er")).unwrap();
        std::fs::create_dir_all(at(".git")).unwrap();
        assert!(data_files_in(dir.path()).unwrap_err().to_string().contains("no data"));
        for name in ["b.txt", "deep/er/a.jsonl", ".hidden.txt", ".git/c.txt", "code.rs"] {
            std::fs::write(at(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(dir.path(), at("deep/loop")).unwrap();
        assert_eq!(data_files_in(dir.path()).unwrap(), [at("b.txt"), at("deep/er/a.jsonl")]);
    }
}
