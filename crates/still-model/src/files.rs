//! Writing beside, then renaming.

use std::io;
use std::path::Path;

/// A new directory in `parent` that is removed unless it is kept: what is complete is renamed from there.
///
/// Unlike the usual temporary directory, others may read it, as far as the umask allows.
///
/// # Errors
/// If it cannot be made.
pub fn staging_dir(parent: &Path, prefix: &str) -> io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent)
}
