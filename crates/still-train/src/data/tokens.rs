//! Files of token ids: what a cache holds, and what may be given as data.
//!
//! A `.bin` is a safetensors file: eight bytes that give the length of a JSON header, the header, and the numbers it
//! describes, little-endian.
//!
//! | entry | dtype, shape | |
//! |---|---|---|
//! | `ids` | `U16` or `U32` `[tokens]` | token ids of all documents, one after the other |
//! | `ends` | `U64` `[documents]` | where each document ends in `ids` |
//! | `answers` | `U64` `[spans, 2]` | optional: tokens whose predictions count, from and to, in order |
//! | metadata `tokenizer` | SHA-256 | of the tokenizer's JSON as its library writes it (`Tokenizer.to_str()` in Python) |
//! | metadata `sha256` | | optional: digest of the content (our caches have it) |
//!
//! Whatever a file records of itself, it is read through when it is opened, by all threads: that takes seconds for a corpus that
//! is trained on for days, and damage is noticed.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};
use sha2::{Digest, Sha256};
use still_model::files::{Staging, open, staging_dir, sweep, sync_files};

use super::documents::data_error;
use crate::error::{Result, TrainError};

/// Bytes that are hashed as one piece.
const PIECE: usize = 4 << 20;

/// Documents of token ids, on disk unless they were made in memory.
#[derive(Clone, Debug)]
pub(super) struct TokenFile {
    bytes: Bytes,
    /// Where the ids lie in the bytes.
    ids: Range<usize>,
    /// Bytes of an id: 2 or 4.
    width: usize,
    ends: Vec<u64>,
    /// Disjoint and in order; every token counts if absent.
    answers: Option<Vec<[u64; 2]>>,
    sha256: String,
}

#[derive(Clone, Debug)]
enum Bytes {
    Mapped(Arc<Mmap>),
    Owned(Arc<Vec<u8>>),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// Whose ids a file's must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected<'a> {
    /// SHA-256 of the tokenizer.
    pub tokenizer: &'a str,
    pub vocab_size: usize,
}

impl TokenFile {
    /// Documents made in memory.
    pub fn from_documents<'a>(documents: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for ids in documents {
            bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            ends.push((bytes.len() / 4) as u64);
        }
        let sha256 = digest(&bytes, &le_bytes(&ends), &[]);
        let ids = 0..bytes.len();
        Self { bytes: Bytes::Owned(bytes.into()), ids, width: 4, ends, answers: None, sha256 }
    }

    /// Maps a file and checks that it is whole.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be read; [`TrainError::Data`] if it is not what it should be.
    pub fn open(path: &Path, expected: Expected<'_>) -> Result<Self> {
        let file = open(path).map_err(TrainError::read(path))?;
        // SAFETY: as with every mapped file, nobody may cut it short while it is read. Our own files are renamed into
        // place and never written again.
        let map = unsafe { Mmap::map(&file) }.map_err(TrainError::read(path))?;
        let entries = Entries::new(path, &map)?;
        entries.check_tokenizer(expected.tokenizer)?;
        let (ids, width) = entries.ids()?;
        let ends = entries.numbers("ends")?;
        let answers = entries.has("answers").then(|| entries.numbers("answers")).transpose()?;
        entries.check_range(ids, width, expected.vocab_size)?;
        let sha256 = digest(ids, ends, answers.unwrap_or_default());
        if entries.metadata("sha256").is_some_and(|recorded| recorded != sha256) {
            return Err(entries.wrong("damaged: its digest is of another content".into()));
        }
        let count = (ids.len() / width) as u64;
        let (ends, answers) = (entries.ends(ends, count)?, entries.spans(answers, count)?);
        let start = ids.as_ptr() as usize - map.as_ptr() as usize;
        let ids = start..start + ids.len();
        Ok(Self { bytes: Bytes::Mapped(map.into()), ids, width, ends, answers, sha256 })
    }

    /// Documents, empty ones included.
    pub fn documents(&self) -> usize {
        self.ends.len()
    }

    /// Tokens of all documents.
    pub fn tokens(&self) -> usize {
        self.ends.last().copied().unwrap_or(0) as usize
    }

    /// Tokens of document `n`, as a range of the file's.
    pub fn document(&self, n: usize) -> Range<u64> {
        let start = n.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[n]
    }

    /// Some of the token ids.
    pub fn ids(&self, range: Range<u64>) -> Vec<u32> {
        let at = |token: u64| self.ids.start + token as usize * self.width;
        let bytes = &self.bytes.get()[at(range.start)..at(range.end)];
        match self.width {
            2 => {
                bytes.chunks_exact(2).map(|id| u16::from_le_bytes([id[0], id[1]]).into()).collect()
            }
            _ => bytes
                .chunks_exact(4)
                .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
                .collect(),
        }
    }

    /// By token of the range, whether its prediction counts; all do if absent.
    pub fn counted(&self, range: Range<u64>) -> Option<Vec<bool>> {
        let answers = self.answers.as_ref()?;
        let mut counted = vec![false; (range.end - range.start) as usize];
        for &[start, end] in overlapping(answers, &range) {
            let (start, end) = (start.max(range.start), end.min(range.end));
            counted[(start - range.start) as usize..(end - range.start) as usize].fill(true);
        }
        Some(counted)
    }

    /// Whether any prediction within a sequence of these tokens counts. Its first token is predicted by nothing.
    pub fn counts_any(&self, range: Range<u64>) -> bool {
        let Some(answers) = &self.answers else { return true };
        let predicted = range.start + 1..range.end;
        overlapping(answers, &predicted).iter().any(|[start, end]| start < end)
    }

    /// SHA-256 of the content.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The same documents, with every prediction counted.
    pub fn counting_all(mut self) -> Self {
        self.answers = None;
        self
    }
}

/// What a file holds, with errors that name it.
struct Entries<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> Entries<'a> {
    fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let unreadable = |error| wrong(path, format!("unreadable: {error}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(unreadable)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(unreadable)?;
        Ok(Self { path, tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    fn wrong(&self, what: String) -> TrainError {
        wrong(self.path, what)
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    fn check_tokenizer(&self, expected: &str) -> Result<()> {
        match self.metadata("tokenizer") {
            Some(tokenizer) if tokenizer == expected => Ok(()),
            Some(tokenizer) => Err(data_error(
                self.path,
                format!("made with tokenizer {tokenizer}, but the model's is {expected}"),
                "tokenize the text with the model's own tokenizer",
            )),
            None => Err(self.wrong("its header names no tokenizer".into())),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.names().contains(&name)
    }

    fn entry(&self, name: &str) -> Result<TensorView<'a>> {
        self.tensors.tensor(name).map_err(|_| self.wrong(format!("no \"{name}\"")))
    }

    /// The ids' bytes, and bytes of each.
    fn ids(&self) -> Result<(&'a [u8], usize)> {
        let ids = self.entry("ids")?;
        match ids.dtype() {
            Dtype::U16 => Ok((ids.data(), 2)),
            Dtype::U32 => Ok((ids.data(), 4)),
            other => Err(self.wrong(format!("\"ids\" is {other:?}, not U16 or U32"))),
        }
    }

    /// Bytes of an entry of `U64`.
    fn numbers(&self, name: &str) -> Result<&'a [u8]> {
        let tensor = self.entry(name)?;
        match tensor.dtype() {
            Dtype::U64 => Ok(tensor.data()),
            other => Err(self.wrong(format!("\"{name}\" is {other:?}, not U64"))),
        }
    }

    /// Documents' ends, which lead to the last of `count` tokens.
    fn ends(&self, bytes: &[u8], count: u64) -> Result<Vec<u64>> {
        let ends = from_le_bytes(bytes);
        if ends.is_sorted() && ends.last().copied().unwrap_or(0) == count {
            return Ok(ends);
        }
        Err(self.wrong(format!("\"ends\" does not lead to its {count} tokens")))
    }

    /// Spans within `count` tokens, in order.
    fn spans(&self, bytes: Option<&[u8]>, count: u64) -> Result<Option<Vec<[u64; 2]>>> {
        let Some(numbers) = bytes.map(from_le_bytes) else { return Ok(None) };
        let (spans, rest) = numbers.as_chunks::<2>();
        let inside = numbers.last().is_none_or(|&end| end <= count);
        if rest.is_empty() && numbers.is_sorted() && inside {
            return Ok(Some(spans.to_vec()));
        }
        Err(self.wrong("\"answers\" are not spans of its tokens, in order".into()))
    }

    /// An error that names the largest id, if it is outside the vocabulary.
    fn check_range(&self, ids: &[u8], width: usize, vocab_size: usize) -> Result<()> {
        let id =
            |bytes: &[u8]| bytes.iter().rev().fold(0_u32, |sum, &byte| sum << 8 | u32::from(byte));
        match ids.par_chunks_exact(width).map(id).max() {
            Some(largest) if largest as usize >= vocab_size => Err(data_error(
                self.path,
                format!("token id {largest}, but the vocabulary has {vocab_size} entries"),
                "the file is damaged, or its ids are of another tokenizer: tokenize the text again with this model's",
            )),
            _ => Ok(()),
        }
    }
}

fn wrong(path: &Path, what: String) -> TrainError {
    data_error(path, what, "it is damaged, or not a file of tokens as still reads them")
}

fn overlapping<'a>(answers: &'a [[u64; 2]], range: &Range<u64>) -> &'a [[u64; 2]] {
    let first = answers.partition_point(|[_, end]| *end <= range.start);
    let last = answers.partition_point(|[start, _]| *start < range.end);
    &answers[first..last.max(first)]
}

/// What is being tokenized is in a directory of this beginning.
const STAGING: &str = ".tokenizing-";

/// Writes a file of tokens, of which only the boundaries are held in memory.
#[derive(Debug)]
pub(super) struct TokenWriter {
    /// Where the ids wait for their header; removed if the file is not finished.
    staging: Staging,
    raw: BufWriter<File>,
    raw_path: PathBuf,
    width: usize,
    count: u64,
    ends: Vec<u64>,
    answers: Option<Vec<u64>>,
}

impl TokenWriter {
    /// Begins a file that will be in `dir`, of ids below `vocab_size`; with `answers` if their spans are to be kept.
    pub fn new(dir: &Path, vocab_size: usize, answers: bool) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(TrainError::write(dir))?;
        sweep(dir, STAGING);
        let staging = staging_dir(dir, STAGING).map_err(TrainError::write(dir))?;
        let raw_path = staging.path().join("ids");
        let raw = BufWriter::new(File::create(&raw_path).map_err(TrainError::write(&raw_path))?);
        let width = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let answers = answers.then(Vec::new);
        Ok(Self { staging, raw, raw_path, width, count: 0, ends: Vec::new(), answers })
    }

    /// Adds ids to the document that is being written.
    pub fn extend(&mut self, ids: &[u32]) -> Result<()> {
        let bytes: Vec<u8> =
            ids.iter().flat_map(|id| id.to_le_bytes().into_iter().take(self.width)).collect();
        self.count += ids.len() as u64;
        self.raw.write_all(&bytes).map_err(TrainError::write(&self.raw_path))
    }

    /// Ends the document; `answers` are spans of its tokens.
    pub fn end_document(&mut self, answers: &[Range<usize>]) -> Result<()> {
        let start = self.ends.last().copied().unwrap_or(0);
        self.ends.push(self.count);
        if let Some(all) = &mut self.answers {
            all.extend(
                answers
                    .iter()
                    .flat_map(|span| [start + span.start as u64, start + span.end as u64]),
            );
        }
        Ok(())
    }

    /// Puts the file in its place.
    pub fn finish(mut self, target: &Path, tokenizer: &str) -> Result<()> {
        let at_target = TrainError::write;
        self.raw.flush().map_err(at_target(target))?;
        let file = File::open(&self.raw_path).map_err(TrainError::read(&self.raw_path))?;
        // SAFETY: the file is in a directory of our own, and no longer written to. An empty one is not mapped.
        let map = match self.count {
            0 => None,
            _ => Some(unsafe { Mmap::map(&file) }.map_err(TrainError::read(&self.raw_path))?),
        };
        let ids: &[u8] = map.as_deref().unwrap_or_default();
        let ends = le_bytes(&self.ends);
        let answers = self.answers.as_deref().map(le_bytes);
        let metadata = HashMap::from([
            ("tokenizer".to_owned(), tokenizer.to_owned()),
            ("sha256".to_owned(), digest(ids, &ends, answers.as_deref().unwrap_or_default())),
        ]);
        let dtype = if self.width == 2 { Dtype::U16 } else { Dtype::U32 };
        let mut entries = vec![
            ("ids", Numbers::new(dtype, vec![self.count as usize], ids)),
            ("ends", Numbers::new(Dtype::U64, vec![self.ends.len()], &ends)),
        ];
        if let Some(bytes) = &answers {
            entries.push(("answers", Numbers::new(Dtype::U64, vec![bytes.len() / 16, 2], bytes)));
        }
        let path = self.staging.path().join("tokens");
        safetensors::serialize_to_file(entries, Some(metadata), &path).map_err(|error| {
            at_target(target)(match error {
                safetensors::SafeTensorError::IoError(error) => error,
                other => std::io::Error::other(other.to_string()),
            })
        })?;
        // The library writes a private file: give it the mode that the umask leaves, as the staged ids have.
        #[cfg(unix)]
        {
            let mode = file.metadata().map_err(at_target(&path))?.permissions();
            std::fs::set_permissions(&path, mode).map_err(at_target(&path))?;
        }
        sync_files(self.staging.path()).map_err(at_target(&path))?;
        std::fs::rename(&path, target).map_err(at_target(target))
    }
}

/// Numbers as they are to lie in the file.
struct Numbers<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl<'a> Numbers<'a> {
    fn new(dtype: Dtype, shape: Vec<usize>, bytes: &'a [u8]) -> Self {
        Self { dtype, shape, bytes }
    }
}

impl View for Numbers<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes.into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn le_bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn from_le_bytes(bytes: &[u8]) -> Vec<u64> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    bytes.chunks_exact(8).map(number).collect()
}

/// SHA-256 over the digests of pieces, which are hashed in parallel.
fn digest(ids: &[u8], ends: &[u8], answers: &[u8]) -> String {
    let mut hasher = Sha256::new();
    for bytes in [ids, ends, answers] {
        hasher.update((bytes.len() as u64).to_le_bytes());
        let pieces: Vec<_> = bytes.par_chunks(PIECE).map(Sha256::digest).collect();
        pieces.iter().for_each(|piece| hasher.update(piece));
    }
    format!("{:x}", hasher.finalize())
}
