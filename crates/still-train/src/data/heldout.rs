//! Documents that are kept for evaluation.

use sha2::{Digest, Sha256};

use super::tokens::TokenFile;

/// Tokens at a document's beginning that decide its side: copies of a document, and most of its variants, begin alike
/// and so are held out together.
const BEGINNING: u64 = 1024;

/// Whether each document of each file is held out: about `share` of them, by a hash of the seed and the document, and
/// at least one. Documents of fewer than `min_length` tokens are read by nobody.
pub(super) fn choose(
    files: &[TokenFile],
    share: f64,
    min_length: usize,
    seed: u64,
) -> Vec<Vec<bool>> {
    let hash = |file: &TokenFile, document: usize| {
        let range = file.document(document);
        if range.end - range.start < min_length as u64 || !file.counts_any(range.clone()) {
            return None;
        }
        let mut hasher = Sha256::new();
        hasher.update(seed.to_le_bytes());
        for id in file.ids(range.start..range.end.min(range.start + BEGINNING)) {
            hasher.update(id.to_le_bytes());
        }
        let digest = hasher.finalize();
        Some(digest[..8].iter().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte)))
    };
    let hashes: Vec<Vec<Option<u64>>> = files
        .iter()
        .map(|file| (0..file.documents()).map(|document| hash(file, document)).collect())
        .collect();
    let least = hashes.iter().flatten().flatten().min().copied().unwrap_or(0);
    let limit = least.max((share * u64::MAX as f64) as u64);
    let held = |hash: Option<u64>| hash.is_some_and(|hash| hash <= limit);
    hashes.into_iter().map(|hashes| hashes.into_iter().map(held).collect()).collect()
}
