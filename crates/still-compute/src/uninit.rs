//! Vectors whose every value is written at once: memory of a large one that is zeroed first passes through the caches once more.

use std::mem::MaybeUninit;

/// A new vector of `length` values, which `write` writes.
///
/// # Safety
/// `write` writes every one of them.
pub unsafe fn new_vec<T>(length: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut values = Vec::with_capacity(length);
    write(&mut values.spare_capacity_mut()[..length]);
    // SAFETY: there is room for as many, and all are written, by this function's own contract.
    unsafe { values.set_len(length) };
    values
}

/// Values as memory that need not have any yet.
///
/// # Safety
/// What is written there are values.
pub(crate) unsafe fn as_uninit<T>(values: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: both have one layout, and no value is taken away, by this function's own contract.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<T>]) }
}

/// Copies values over memory that need not have any yet.
///
/// # Panics
/// If they are not equally many.
#[inline(always)]
pub(crate) fn copy<T: Copy>(from: &[T], to: &mut [MaybeUninit<T>]) {
    assert_eq!(from.len(), to.len(), "copy to memory of another length");
    for (to, &from) in to.iter_mut().zip(from) {
        to.write(from);
    }
}
