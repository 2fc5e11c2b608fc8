//! How freed memory is kept.

/// Keeps large freed blocks for the next allocation instead of giving them back to the system.
///
/// Training and prefill allocate and free the same large activations over and over. By default glibc maps and
/// unmaps each of them, and the system clears every page anew: a third of a training step's time.
pub fn keep_freed_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets parameters of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
