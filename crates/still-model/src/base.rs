//! What a base is recognized by, and the hash of large files, which is computed once.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{ModelError, Result};
use crate::fetch::cache_dir;
use crate::files::write_file;

/// A file may change again within one tick of its file system's clock: FAT's are the longest.
const TICK: Duration = Duration::from_secs(2);

/// Where a base model's weights came from.
#[derive(Clone, Debug, Default)]
pub struct BaseIdentity {
    /// What the user named: a path or a hub id.
    pub source: String,
    /// The weight files, in order; empty for a model made in memory.
    pub files: Vec<PathBuf>,
    /// What its `generation_config.json` holds, if it has one, or a GGUF file's `general.sampling.*` in its place.
    pub generation_config: Option<Value>,
}

impl BaseIdentity {
    /// SHA-256 over the weight files' bytes, in hexadecimal. It is remembered in the user's cache directory by what tells a file
    /// that has not changed: device, inode, size, times.
    ///
    /// # Errors
    /// An unreadable file.
    pub fn sha256(&self) -> Result<String> {
        match cache_dir() {
            Ok(dir) => self.sha256_cached_in(&dir.join("sha256")),
            Err(_) => self.sha256_of_bytes(),
        }
    }

    /// [`BaseIdentity::sha256`], computed whatever is remembered.
    ///
    /// # Errors
    /// An unreadable file.
    pub fn sha256_of_bytes(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        for path in &self.files {
            let mut file = crate::files::open(path).map_err(ModelError::read(path))?;
            std::io::copy(&mut file, &mut hasher).map_err(ModelError::read(path))?;
        }
        Ok(format!("{:x}", hasher.finalize()))
    }

    /// One small file a base: written whole or not at all, so that several processes may do it at once, and with a digest of its
    /// own. A cache that cannot be read or written costs only time.
    fn sha256_cached_in(&self, dir: &Path) -> Result<String> {
        let Some(key) = self.key().filter(|_| !self.files.is_empty()) else {
            return self.sha256_of_bytes();
        };
        let path = dir.join(&key);
        let line = |sha256: &str| {
            let check = Sha256::digest(format!("{key} {sha256}"));
            format!("{sha256} {check:x}\n")
        };
        if let Ok(known) = std::fs::read_to_string(&path)
            && let Some((sha256, _)) = known.split_once(' ')
            && line(sha256) == known
        {
            return Ok(sha256.to_owned());
        }
        let sha256 = self.sha256_of_bytes()?;
        // Only of files that stayed as they were, and can no longer change unnoticed.
        if self.key().as_deref() == Some(key.as_str()) && self.has_settled() {
            let written = std::fs::create_dir_all(dir)
                .and_then(|()| write_file(&path, line(&sha256).as_bytes()));
            if let Err(error) = written {
                tracing::debug!("{} was not written: {error}", path.display());
            }
        }
        Ok(sha256)
    }

    /// What a file is known by; none if the system does not tell.
    fn key(&self) -> Option<String> {
        let files = self.files.iter().map(|path| {
            let stat = std::fs::metadata(path).ok()?;
            Some(json!([identity(path, &stat)?, stat.len(), nanoseconds(stat.modified().ok()?)]))
        });
        let files = files.collect::<Option<Vec<Value>>>()?;
        Some(format!("{:x}", Sha256::digest(Value::Array(files).to_string())))
    }

    fn has_settled(&self) -> bool {
        self.files.iter().all(|path| {
            let modified = std::fs::metadata(path).and_then(|stat| stat.modified());
            modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > TICK))
        })
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

/// Device, inode and the time of the last change of either, which a program cannot set: a file that was written over and given
/// its old time back is another.
#[cfg(unix)]
fn identity(_: &Path, stat: &Metadata) -> Option<Value> {
    use std::os::unix::fs::MetadataExt;
    Some(json!([stat.dev(), stat.ino(), stat.ctime(), stat.ctime_nsec()]))
}

#[cfg(not(unix))]
fn identity(path: &Path, _: &Metadata) -> Option<Value> {
    Some(json!(path.canonicalize().ok()?.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_remembered_until_its_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cache) = (dir.path().join("weights"), dir.path().join("cache"));
        let base = BaseIdentity { files: vec![path.clone()], ..BaseIdentity::default() };
        let old = SystemTime::now() - Duration::from_secs(3600);
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        };
        let entries = || cache.read_dir().map_or(0, Iterator::count);
        let sum = |text: &str| format!("{:x}", Sha256::digest(text));
        let hash = || base.sha256_cached_in(&cache).unwrap();

        write("north");
        assert_eq!((hash(), entries()), (sum("north"), 1));
        assert_eq!((hash(), entries()), (sum("north"), 1));
        // It is the file in the cache that is believed: if it is whole.
        let cached = cache.read_dir().unwrap().next().unwrap().unwrap().path();
        let known = std::fs::read(&cached).unwrap();
        for at in 0..known.len() {
            let mut bytes = known.clone();
            bytes[at] ^= 1;
            std::fs::write(&cached, bytes).unwrap();
            assert_eq!(hash(), sum("north"), "byte {at}");
            assert_eq!(std::fs::read(&cached).unwrap(), known);
        }
        // Written over, of the same size and time.
        #[cfg(unix)]
        {
            std::thread::sleep(Duration::from_millis(20));
            write("south");
            assert_eq!(hash(), sum("south"));
        }
        // What has only just been written may change again.
        std::fs::write(&path, "west!").unwrap();
        let before = entries();
        assert_eq!((hash(), entries()), (sum("west!"), before));
        // Nowhere to write to.
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(base.sha256_cached_in(&file).unwrap(), sum("west!"));
    }
}
