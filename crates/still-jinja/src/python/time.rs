//! `datetime.now().strftime(…)`.

use std::ffi::CString;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Result, type_error};

/// A date longer than this is none.
const LONGEST: usize = 4096;

/// A time in the local zone by the C library's format, as Python's is.
pub(crate) fn strftime(format: &str, time: SystemTime) -> Result<String> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    // A time without a zone has no `%z`, and Python knows of microseconds what C does not.
    let micros = format!("{:06}", since.subsec_micros());
    let mut spelled = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '%' { chars.next() } else { None }) {
            ('%', Some('f')) => spelled.push_str(&micros),
            ('%', Some('z' | 'Z')) => {}
            ('%', Some(other)) => spelled.extend(['%', other]),
            (c, _) => spelled.push(c),
        }
    }
    if spelled.is_empty() {
        return Ok(spelled);
    }
    // The result of an empty format and of a failure look the same: this one is never empty.
    let format = CString::new(format!("{spelled}."))
        .map_err(|_| type_error("strftime: embedded null character"))?;
    let seconds = since.as_secs() as libc::time_t;
    let mut buffer = vec![0u8; LONGEST];
    // SAFETY: `tm` is plain data that `localtime_r` fills; `strftime` writes at most the buffer's length.
    let written = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&raw const seconds, &raw mut tm).is_null() {
            return Err(type_error("strftime: no local time"));
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &raw const tm)
    };
    if written == 0 {
        return Err(type_error(format!("strftime: longer than {LONGEST} bytes")));
    }
    Ok(String::from_utf8_lossy(&buffer[..written - 1]).into_owned())
}
