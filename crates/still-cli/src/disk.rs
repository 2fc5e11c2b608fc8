//! Free space on disks.

use std::path::Path;

use crate::errors::user;
use crate::table;

/// An error unless the disk of `place` has room for so many bytes.
///
/// # Errors
/// How much it has.
pub fn room(place: &Path, what: &str, needed: u64, hint: &str) -> anyhow::Result<()> {
    match free_bytes(place) {
        Some(free) if free < needed => {
            let size = |bytes: u64| table::bytes(usize::try_from(bytes).unwrap_or(usize::MAX));
            let (place, free, needed) = (place.display(), size(free), size(needed));
            Err(user(
                format!(
                    "the disk of {place} has {free} free, and {what} would take about {needed}"
                ),
                hint,
            ))
        }
        _ => Ok(()),
    }
}

/// Bytes that may still be written to the disk of a file or directory, where the system tells.
pub fn free_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
        // SAFETY: an all-zero statvfs is valid, the path ends in a NUL, and statvfs only writes to the former.
        let stat = unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            (libc::statvfs(path.as_ptr(), &raw mut stat) == 0).then_some(stat)?
        };
        #[allow(clippy::unnecessary_cast, reason = "the fields have other widths elsewhere")]
        Some((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Whether two things that are there share a disk.
pub fn same_disk(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
        device(a) == device(b)
    }
    #[cfg(not(unix))]
    {
        let _ = (a, b);
        true
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_no_disk_has_is_refused() {
        let here = Path::new(".");
        assert!(free_bytes(here).is_some() && free_bytes(Path::new("/no/such")).is_none());
        room(here, "nothing", 0, "").unwrap();
        let error = room(here, "everything", u64::MAX, "").unwrap_err().to_string();
        assert!(error.contains("everything would take about"), "{error}");
        assert!(same_disk(here, Path::new("./.")));
    }
}
