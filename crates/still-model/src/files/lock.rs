//! One process at a time in a directory.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::staging::is_at;

/// How often a lock file is opened that its holder removes at that moment.
const TRIES: usize = 16;

/// A lock that is held until it is dropped. The system gives it up when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

/// The result of [`Lock::take`].
#[derive(Debug)]
pub enum Locking {
    /// This process holds it.
    Acquired(Lock),
    /// Another process holds it: which, and since when, in words.
    Taken(String),
}

impl Lock {
    /// Takes the lock that is the file `path`. On a file system without locks it succeeds, and logs that (`tracing`).
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn take(path: &Path) -> io::Result<Locking> {
        for _ in 0..TRIES {
            let open =
                File::options().read(true).write(true).create(true).truncate(false).open(path);
            let mut file = open?;
            match file.try_lock() {
                Ok(()) if !is_at(&file, path) => continue,
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    // Unreadable, it is a lock all the same.
                    let _ = file.read_to_string(&mut text);
                    return Ok(Locking::Taken(holder(&text, SystemTime::now())));
                }
                Err(std::fs::TryLockError::Error(error)) => tracing::warn!(
                    "{}: this file system has no locks ({error}): nothing keeps a second run out",
                    path.display()
                ),
            }
            let since =
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
            // For those who come second; without it the lock holds no less.
            let _ = file.set_len(0).and_then(|()| file.rewind());
            let _ = writeln!(file, "{} {since}", std::process::id());
            return Ok(Locking::Acquired(Self { file, path: path.to_path_buf() }));
        }
        Err(io::Error::other("something removes the lock as soon as it is made"))
    }

    /// Gives the lock up and removes its file.
    pub fn remove(self) {
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// `process 1234, for 3 min`.
fn holder(text: &str, now: SystemTime) -> String {
    let words = text.split_once(' ').and_then(|(pid, since)| {
        let since = UNIX_EPOCH + Duration::from_secs(since.trim().parse().ok()?);
        let seconds = now.duration_since(since).unwrap_or_default().as_secs();
        let age = match seconds {
            0..120 => format!("{seconds} s"),
            120..7200 => format!("{} min", seconds / 60),
            _ => format!("{} h", seconds / 3600),
        };
        Some(format!("process {}, for {age}", pid.parse::<u32>().ok()?))
    });
    words.unwrap_or_else(|| "another process".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_one_holders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let Locking::Acquired(lock) = Lock::take(&path).unwrap() else { panic!("taken") };
        let Locking::Taken(by) = Lock::take(&path).unwrap() else { panic!("taken twice") };
        assert!(by.starts_with(&format!("process {}, for ", std::process::id())), "{by}");
        lock.remove();
        assert!(!path.exists());
        // A file that a killed process left is no lock.
        std::fs::write(&path, "1 1\n").unwrap();
        let Locking::Acquired(_lock) = Lock::take(&path).unwrap() else { panic!("stale") };
    }

    #[test]
    fn holders_are_told_in_words() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000);
        assert_eq!(holder("12 9990\n", now), "process 12, for 10 s");
        assert_eq!(holder("12 1000\n", now), "process 12, for 2 h");
        assert_eq!(holder("", now), "another process");
    }
}
