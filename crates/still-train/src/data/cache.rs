//! Text is tokenized once: where its ids are kept, and how they are found again.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use still_model::Tokenizer;
use still_model::files::open;

use super::documents::data_error;
use super::kind::{Content, Kind};
use super::tokenize::{TextOptions, tokenize};
use super::tokens::{Expected, TokenFile, TokenWriter};
use crate::error::{Result, TrainError};

/// Changed whenever the same file gives other ids.
const VERSION: u32 = 5;
/// A file may change again within one tick of its file system's clock: FAT's are the longest.
const TICK: Duration = Duration::from_secs(2);

/// A directory of tokenized files, `KEY.bin` each.
///
/// The key is the SHA-256 of the file's path, size and time, the tokenizer, the chat template and the options that
/// decide the ids. Path, size and time rather than the content, so that a large corpus is not read to find out that it
/// need not be read; the content of a file that is only seconds old is hashed too. A run's own identity is another
/// matter: it is that of the ids ([`crate::Windows::sha256`]).
#[derive(Clone, Debug)]
pub struct TokenCache {
    dir: PathBuf,
}

impl TokenCache {
    /// The user's: `tokens` next to fetched models, in `$STILL_CACHE`.
    ///
    /// # Errors
    /// If the system names no cache directory.
    pub fn user() -> Result<Self> {
        Ok(Self::at(still_model::fetch::cache_dir()?.join("tokens")))
    }

    /// A directory of one's own; it is made when it is needed.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// A file's ids: read, or tokenized first. A damaged cache is told (`tracing`) and made anew.
    pub(super) fn open(
        &self,
        path: &Path,
        tokenizer: &Identified<'_>,
        options: &TextOptions,
    ) -> Result<TokenFile> {
        let kind = Kind::of(path)?;
        if kind.content == Content::Tokens {
            return TokenFile::open(path, tokenizer.expected());
        }
        let before = stat(path)?;
        let key = key(path, &before, kind, tokenizer, options)?;
        let cached = self.dir.join(format!("{key}.bin"));
        match TokenFile::open(&cached, tokenizer.expected()) {
            Ok(file) => return Ok(file),
            Err(TrainError::Data { what, .. }) => {
                tracing::warn!(
                    "{} is damaged ({what}): tokenizing {} again",
                    cached.display(),
                    path.display()
                );
            }
            Err(TrainError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                tracing::info!("tokenizing {}", path.display());
            }
            Err(error) => return Err(error),
        }
        let mut writer =
            TokenWriter::new(&self.dir, tokenizer.vocab_size, options.counts_answers())?;
        tokenize(path, kind, tokenizer.tokenizer, options, &mut writer)?;
        let after = stat(path)?;
        if (before.len(), modified(&before)) != (after.len(), modified(&after)) {
            let hint = "wait until it is complete, then start again";
            return Err(data_error(path, "changed while it was read".into(), hint));
        }
        writer.finish(&cached, &tokenizer.sha256)?;
        TokenFile::open(&cached, tokenizer.expected())
    }
}

/// A tokenizer and what it is recognized by.
#[derive(Debug)]
pub(super) struct Identified<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Of its JSON.
    pub sha256: String,
    pub vocab_size: usize,
    /// Its configuration, the chat template in it.
    config: &'a Value,
}

impl<'a> Identified<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Result<Self> {
        let (json, config) = tokenizer.to_json()?;
        let sha256 = format!("{:x}", Sha256::digest(json));
        Ok(Self { tokenizer, sha256, vocab_size: tokenizer.vocab_size(), config })
    }

    fn expected(&self) -> Expected<'_> {
        Expected { tokenizer: &self.sha256, vocab_size: self.vocab_size }
    }
}

fn stat(path: &Path) -> Result<Metadata> {
    std::fs::metadata(path).map_err(TrainError::read(path))
}

fn modified(stat: &Metadata) -> SystemTime {
    // A file system without times leaves every file new, and so hashed.
    stat.modified().unwrap_or_else(|_| SystemTime::now())
}

fn key(
    path: &Path,
    stat: &Metadata,
    kind: Kind,
    tokenizer: &Identified<'_>,
    options: &TextOptions,
) -> Result<String> {
    let real = std::fs::canonicalize(path).map_err(TrainError::read(path))?;
    let time = modified(stat);
    let is_new = time.elapsed().is_ok_and(|age| age < TICK) || time > SystemTime::now();
    let content = if is_new { Some(hash_file(path)?) } else { None };
    // What does not matter to a kind of file must not make it another.
    let lines = kind.has_fields();
    let key = json!({
        "version": VERSION,
        "path": real,
        "bytes": stat.len(),
        "modified_ns": time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos()) as u64,
        "content": content,
        "tokenizer": tokenizer.sha256,
        "template": lines.then_some(tokenizer.config),
        "text_field": lines.then_some(&options.text_field),
        "answers": options.counts_answers(),
    });
    Ok(format!("{:x}", Sha256::digest(key.to_string())))
}

fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut file = open(path).map_err(TrainError::read(path))?;
    std::io::copy(&mut file, &mut hasher).map_err(TrainError::read(path))?;
    Ok(format!("{:x}", hasher.finalize()))
}
