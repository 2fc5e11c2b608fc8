//! Values that are written once and read again and again, in pages as large as the system has.
//!
//! A decode step reads every weight once. In pages of 4 KB a hundred megabytes are 25,000 of them, and to find each takes as long as
//! to read it. So such values lie one after the other in regions for which the system is asked for pages of 2 MB.

use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pulp::bytemuck::Pod;

/// Bytes of a large page.
const PAGE: usize = 2 << 20;

/// Bytes of the largest region that is made for more than one set of values.
const LARGEST: usize = 32 << 20;

/// Where a set of values begins: at a cache line.
const LINE: usize = 64;

/// Values in large pages, where the system has them; cheap to clone.
pub struct Pages<T> {
    region: Arc<Region>,
    /// Of the first value, in bytes.
    start: usize,
    length: usize,
    values: PhantomData<T>,
}

impl<T: Pod> Pages<T> {
    /// `length` zeros, over which `write` writes.
    pub fn new(length: usize, write: impl FnOnce(&mut [T])) -> Self {
        const { assert!(align_of::<T>() <= LINE) };
        let (region, start) = Room::take(&ROOM, length * size_of::<T>());
        let made = Self { region, start, length, values: PhantomData };
        // SAFETY: the bytes are zeros, which are values of such a type, and nobody else has them before `made` is returned.
        write(unsafe { std::slice::from_raw_parts_mut(made.first().as_ptr(), length) });
        made
    }

    fn first(&self) -> NonNull<T> {
        // SAFETY: the values lie in the region.
        unsafe { self.region.start.add(self.start).cast() }
    }
}

impl<T> Clone for Pages<T> {
    fn clone(&self) -> Self {
        Self { region: self.region.clone(), ..*self }
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the region holds these values for as long as `self` has it, and nobody writes them any more.
        unsafe { std::slice::from_raw_parts(self.first().as_ptr(), self.length) }
    }
}

/// Where there is room for more values.
struct Room {
    /// Only those who have values there keep it.
    region: Weak<Region>,
    used: usize,
    /// Bytes of the last region that was made for more than one set of values.
    last: usize,
}

static ROOM: Mutex<Room> = Mutex::new(Room { region: Weak::new(), used: 0, last: 0 });

impl Room {
    /// A region, and from where on so many bytes of it are the caller's.
    fn take(room: &Mutex<Self>, bytes: usize) -> (Arc<Region>, usize) {
        if bytes >= LARGEST {
            return (Arc::new(Region::new(bytes)), 0);
        }
        let mut room = room.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = (room.used, room.used + bytes.next_multiple_of(LINE));
        if let Some(region) = room.region.upgrade().filter(|region| end <= region.bytes) {
            room.used = end;
            return (region, start);
        }
        // Twice as large as the one before: a small model takes little.
        let region = Arc::new(Region::new(bytes.max((2 * room.last).min(LARGEST))));
        let (last, used) = (region.bytes, bytes.next_multiple_of(LINE));
        *room = Self { region: Arc::downgrade(&region), used, last };
        (region, 0)
    }
}

/// Zeros that begin where a large page does.
struct Region {
    start: NonNull<u8>,
    /// A multiple of [`PAGE`].
    bytes: usize,
}

// SAFETY: a region is memory, of which each part is written by one owner before it is shared.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(bytes: usize) -> Self {
        let bytes = bytes.max(1).next_multiple_of(PAGE);
        Self { start: system::take(bytes), bytes }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: nobody has values there any more, and `take` gave it for so many bytes.
        unsafe { system::give_back(self.start, self.bytes) }
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::alloc::{Layout, handle_alloc_error};
    use std::ptr::{NonNull, null_mut};

    use super::PAGE;

    /// `bytes` zeros that begin where a large page does, and have been used by nobody: pages that were used as small ones stay small.
    pub fn take(bytes: usize) -> NonNull<u8> {
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping changes no memory; what lies before and after the pages in it is given back; the advice changes
        // nothing but speed, so that a system that has no large pages may refuse it.
        unsafe {
            let all = libc::mmap(null_mut(), bytes + PAGE, rights, kind, -1, 0);
            if all == libc::MAP_FAILED {
                handle_alloc_error(Layout::from_size_align(bytes, PAGE).expect("a size of memory"))
            }
            let before = all.cast::<u8>().align_offset(PAGE);
            let start = all.cast::<u8>().add(before);
            if before > 0 {
                libc::munmap(all, before);
            }
            libc::munmap(start.add(bytes).cast(), PAGE - before);
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            NonNull::new(start).expect("a mapping is not at 0")
        }
    }

    /// # Safety
    /// [`take`] gave `start` for `bytes`, and nobody uses them any more.
    pub unsafe fn give_back(start: NonNull<u8>, bytes: usize) {
        // SAFETY: by this function's own contract.
        unsafe { libc::munmap(start.as_ptr().cast(), bytes) };
    }
}

/// How other systems are asked for large pages is not known here.
#[cfg(not(target_os = "linux"))]
mod system {
    use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
    use std::ptr::NonNull;

    use super::PAGE;

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, PAGE).expect("a size of memory")
    }

    /// `bytes` zeros that begin where a large page would.
    pub fn take(bytes: usize) -> NonNull<u8> {
        // SAFETY: there is at least a page of them.
        let start = unsafe { alloc_zeroed(layout(bytes)) };
        NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout(bytes)))
    }

    /// # Safety
    /// [`take`] gave `start` for `bytes`, and nobody uses them any more.
    pub unsafe fn give_back(start: NonNull<u8>, bytes: usize) {
        // SAFETY: by this function's own contract.
        unsafe { dealloc(start.as_ptr(), layout(bytes)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(length: usize, with: u32) -> Pages<u32> {
        Pages::new(length, |values| {
            assert!(values.iter().all(|&value| value == 0));
            values.fill(with);
        })
    }

    #[test]
    fn values_are_zeros_then_what_was_written() {
        let lengths = [0, 1, 15, 17, 1000, PAGE / 4 - 1, PAGE, LARGEST / 4, 3];
        let all: Vec<_> = lengths.iter().map(|&length| filled(length, length as u32)).collect();
        let copies = all.clone();
        drop(all);
        for (values, length) in copies.iter().zip(lengths) {
            assert_eq!(values.len(), length);
            assert!(values.iter().all(|&value| value == length as u32));
            assert!(values.as_ptr().addr().is_multiple_of(LINE));
        }
    }

    #[test]
    fn threads_have_parts_of_their_own() {
        std::thread::scope(|scope| {
            for thread in 0..8_u32 {
                scope.spawn(move || {
                    let all: Vec<_> = (0..200).map(|i| filled(i * 7, 1000 * thread)).collect();
                    assert!(all.iter().all(|part| part.iter().all(|&x| x == 1000 * thread)));
                });
            }
        });
    }

    #[test]
    fn a_region_is_as_large_as_needed_and_goes_with_its_last_values() {
        let room = Mutex::new(Room { region: Weak::new(), used: 0, last: 0 });
        let (first, start) = Room::take(&room, 100);
        assert_eq!((first.bytes, start), (PAGE, 0));
        let (again, start) = Room::take(&room, 100);
        assert!(Arc::ptr_eq(&first, &again) && start == 128);
        let (second, start) = Room::take(&room, PAGE);
        assert_eq!((second.bytes, start), (2 * PAGE, 0));
        let (own, start) = Room::take(&room, LARGEST + 1);
        assert_eq!((own.bytes, start), (LARGEST + PAGE, 0));
        let known = Arc::downgrade(&first);
        drop((first, again));
        assert!(known.upgrade().is_none());
        drop(second);
        let (third, start) = Room::take(&room, 1);
        assert_eq!((third.bytes, start), (4 * PAGE, 0));
    }
}
