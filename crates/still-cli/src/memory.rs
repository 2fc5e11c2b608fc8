//! The allocator, and peak memory.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicBool, Ordering};

use libmimalloc_sys::{
    mi_option_large_os_pages, mi_option_set_default, mi_option_set_enabled_default, mi_option_t,
    mi_option_use_numa_nodes,
};
use mimalloc::MiMalloc;

/// Of the program, and of the Python package.
#[global_allocator]
static ALLOCATOR: LargePages = LargePages;

/// mimalloc, asked for pages of 2 MB and to keep what is freed for the next allocation. Prefill and training make and drop activations of a
/// megabyte for every block of tokens and every layer. In pages of 4 KB their rows lie in hundreds, more than a core remembers the
/// places of; and the system clears every page that it is given back.
///
/// mimalloc's own variables, such as `MIMALLOC_ALLOW_LARGE_OS_PAGES=0` and `MIMALLOC_PURGE_DELAY=10`, count before this.
struct LargePages;

/// The milliseconds after which free memory is given back, −1 for never. The bindings leave it out; the header has it before the next one.
const PURGE_DELAY: mi_option_t = mi_option_use_numa_nodes - 1;

/// Whether mimalloc has been asked. It takes its first memory for the first allocation, which is before `main`.
static ASKED: AtomicBool = AtomicBool::new(false);

#[inline]
fn ask() {
    if !ASKED.load(Ordering::Relaxed) {
        // SAFETY: both set a number, and allocate nothing.
        unsafe {
            mi_option_set_enabled_default(mi_option_large_os_pages, true);
            mi_option_set_default(PURGE_DELAY, -1);
        }
        ASKED.store(true, Ordering::Relaxed);
    }
}

// SAFETY: mimalloc's.
unsafe impl GlobalAlloc for LargePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ask();
        // SAFETY: by this function's own contract.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ask();
        // SAFETY: by this function's own contract.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: by this function's own contract.
        unsafe { MiMalloc.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by this function's own contract.
        unsafe { MiMalloc.realloc(block, layout, size) }
    }
}

/// The most memory that this process has had resident, in bytes, where the system tells.
pub fn peak_resident_bytes() -> Option<u64> {
    #[cfg(unix)]
    {
        // SAFETY: an all-zero rusage is valid, and getrusage only writes to it.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            (libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0).then_some(usage)?
        };
        // Linux counts kilobytes, macOS bytes.
        let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
        Some(usage.ru_maxrss as u64 * unit)
    }
    #[cfg(not(unix))]
    None
}
