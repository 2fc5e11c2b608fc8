//! GGUF files that are damaged or unknown: one clear error, never a panic, never an allocation of what they claim.

use std::path::{Path, PathBuf};

use still_model::{Checkpoint, ModelError};

fn sound() -> Vec<u8> {
    let path = still_model::fetch::demo_model(&mut |line| eprintln!("{line}")).unwrap();
    std::fs::read(path).unwrap()
}

fn open(dir: &Path, bytes: &[u8]) -> ModelError {
    let path: PathBuf = dir.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(path.to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("model.gguf"), "{error}");
    assert!(error.hint().is_some(), "{error}");
    error
}

/// Replaces the first `from` after `after` by `to`, of equal length.
fn patched(bytes: &[u8], after: &str, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let find = |needle: &[u8], start: usize| {
        start + bytes[start..].windows(needle.len()).position(|window| window == needle).unwrap()
    };
    let key = find(after.as_bytes(), 0) + after.len();
    let at = find(from.as_bytes(), key);
    let mut bytes = bytes.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    bytes
}

#[test]
fn damaged_and_unknown_files() {
    let bytes = sound();
    let dir = tempfile::tempdir().unwrap();

    // Cut off in the data, in the header, after the magic, at once.
    let cut = open(dir.path(), &bytes[..bytes.len() - 1000]);
    assert!(cut.to_string().contains("truncated"), "{cut}");
    for length in [1_000_000, 2000, 4, 0] {
        open(dir.path(), &bytes[..length]);
    }
    assert!(open(dir.path(), &[0x5a; 5000]).to_string().contains("not a GGUF"));

    // Lengths that claim the impossible, in every place of the first kilobyte.
    let head = &bytes[..2_000_000];
    for at in (8..1024).step_by(8) {
        let mut wild = head.to_vec();
        wild[at..at + 8].fill(0xff);
        open(dir.path(), &wild);
    }

    let pre = open(dir.path(), &patched(&bytes, "tokenizer.ggml.pre", "smollm", "marvin"));
    assert!(pre.to_string().contains("\"marvin\""), "{pre}");
    let kind = open(dir.path(), &patched(&bytes, "tokenizer.ggml.model", "gpt2", "bert"));
    assert!(kind.to_string().contains("\"bert\""), "{kind}");
    let architecture = open(dir.path(), &patched(&bytes, "general.architecture", "llama", "mamba"));
    assert!(architecture.to_string().contains("mamba"), "{architecture}");
}
