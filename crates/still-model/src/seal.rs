//! A file's digest, kept in the file: BLAKE3 over all its bytes, with the digest's own 64 digits counted as zeros.
//!
//! Every file of tensors that we write has one: a safetensors file as `blake3` in its `__metadata__`, a quantized student as
//! `still.blake3` in its GGUF metadata, a JSON file that describes tensors as its key `blake3`. Whoever reads the file knows from
//! elsewhere (a format number) whether it must have one, so that damage to the key itself is noticed too.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use blake3::Hasher;
use memmap2::Mmap;

use crate::error::{ModelError, Result};

/// The digest before it is known.
pub const BLANK: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// The key of the digest in JSON and in a safetensors header.
pub const KEY: &str = "blake3";
/// The key of the digest in a GGUF file.
pub const GGUF_KEY: &str = "still.blake3";
/// Bytes at the beginning of a GGUF file among which its digest is.
const GGUF_START: usize = 4096;

/// What a file's digest says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seal {
    /// Every byte is as it was written.
    Whole,
    /// Some byte is not.
    Broken,
    /// There is no digest.
    Absent,
}

/// How a kind of file holds its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Kind {
    Safetensors,
    Gguf,
    Json,
}

impl Kind {
    /// Where in the file the digits of its digest are.
    fn place(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Safetensors => {
                let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
                let end = usize::try_from(length).ok()?.checked_add(8)?;
                Some(8 + in_json(bytes.get(8..end)?)?)
            }
            Self::Json => in_json(bytes),
            Self::Gguf => {
                // A text of 64 bytes, as GGUF has it.
                let mut key = GGUF_KEY.as_bytes().to_vec();
                key.extend(8_u32.to_le_bytes());
                key.extend((BLANK.len() as u64).to_le_bytes());
                let start = &bytes[..bytes.len().min(GGUF_START)];
                let at = start.windows(key.len()).position(|window| window == key)? + key.len();
                (bytes.len() >= at + BLANK.len()).then_some(at)
            }
        }
    }
}

/// After `"blake3":`, with or without a blank.
fn in_json(text: &[u8]) -> Option<usize> {
    let key = format!("\"{KEY}\":");
    let mut from = 0;
    while let Some(found) = find(&text[from..], key.as_bytes()) {
        from += found + key.len();
        let at = from + text[from..].iter().take_while(|&&byte| byte == b' ').count() + 1;
        let digits = text.get(at..at + BLANK.len());
        let quoted = text.get(at - 1) == Some(&b'"') && text.get(at + BLANK.len()) == Some(&b'"');
        if quoted && digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
            return Some(at);
        }
    }
    None
}

fn find(text: &[u8], key: &[u8]) -> Option<usize> {
    text.windows(key.len()).position(|window| window == key)
}

fn digest(bytes: &[u8], place: usize) -> String {
    let mut hasher = Hasher::new();
    hasher.update_rayon(&bytes[..place]);
    hasher.update(BLANK.as_bytes());
    hasher.update_rayon(&bytes[place + BLANK.len()..]);
    hasher.finalize().to_hex().to_string()
}

/// Looks at the bytes of a file.
pub fn check(bytes: &[u8], kind: Kind) -> Seal {
    match kind.place(bytes) {
        None => Seal::Absent,
        Some(at) if digest(bytes, at).as_bytes() == &bytes[at..at + BLANK.len()] => Seal::Whole,
        Some(_) => Seal::Broken,
    }
}

/// Whether the bytes of a file have a digest, right or wrong.
pub fn is_sealed(bytes: &[u8], kind: Kind) -> bool {
    kind.place(bytes).is_some()
}

/// The text of a JSON file that has [`BLANK`] for its digest, with the digest.
pub fn sealed_json(text: String) -> String {
    let Some(at) = Kind::Json.place(text.as_bytes()) else { return text };
    let digest = digest(text.as_bytes(), at);
    [&text[..at], &digest, &text[at + BLANK.len()..]].concat()
}

/// Puts the digest of a file that has [`BLANK`] for it in its place.
///
/// # Errors
/// If the file has no place for it, or cannot be read or written.
pub fn seal(file: &mut File, kind: Kind) -> io::Result<()> {
    // SAFETY: the file is our own, and complete; nobody cuts it short. The map ends before the file is written again.
    let map = unsafe { Mmap::map(&*file) }?;
    let at = kind.place(&map).ok_or_else(no_place)?;
    let digest = digest(&map, at);
    drop(map);
    file.seek(SeekFrom::Start(at as u64))?;
    file.write_all(digest.as_bytes())
}

/// [`seal`] of a file's bytes in memory.
///
/// # Errors
/// If there is no place for it.
pub fn seal_bytes(bytes: &mut [u8], kind: Kind) -> io::Result<()> {
    let at = kind.place(bytes).ok_or_else(no_place)?;
    let digest = digest(bytes, at);
    bytes[at..at + BLANK.len()].copy_from_slice(digest.as_bytes());
    Ok(())
}

fn no_place() -> io::Error {
    io::Error::other("no place for the digest")
}

/// An error unless the file is whole; one without a digest is told to be damaged if it must have one, and let through otherwise.
///
/// # Errors
/// [`ModelError::Corrupt`], which names the file.
pub fn expect(path: &Path, bytes: &[u8], kind: Kind, required: bool) -> Result<()> {
    match check(bytes, kind) {
        Seal::Broken => Err(ModelError::corrupt(
            path,
            "damaged: its digest is of other bytes than it has (it was changed after it was written)",
        )),
        Seal::Absent if required => Err(without_digest(path)),
        Seal::Whole | Seal::Absent => Ok(()),
    }
}

/// The error of a file that must have a digest and has none.
pub(crate) fn without_digest(path: &Path) -> ModelError {
    ModelError::corrupt(path, "damaged, or written again by another program: it has no digest")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flip of any bit is noticed, or takes the digest's key away, which whoever expects one notices.
    #[test]
    fn every_bit_counts() {
        let text = format!("{{\n  \"a\": \"blake3\",\n  \"{KEY}\": \"{BLANK}\",\n  \"b\": 1\n}}");
        let sealed = sealed_json(text);
        assert_eq!(check(sealed.as_bytes(), Kind::Json), Seal::Whole);
        for bit in 0..sealed.len() * 8 {
            let mut bytes = sealed.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(check(&bytes, Kind::Json), Seal::Whole, "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert_ne!(check(&sealed.as_bytes()[..length], Kind::Json), Seal::Whole, "{length}");
        }
        assert_eq!(check(br#"{"blake3":"abc"}"#, Kind::Json), Seal::Absent);
        assert_eq!(check(b"\xff\xff\xff\xff\xff\xff\xff\xff", Kind::Safetensors), Seal::Absent);
        assert_eq!(check(b"", Kind::Gguf), Seal::Absent);
    }
}
