//! Panics of the tokenizer library, caught: some files and texts that it should refuse make it panic.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread is caught and becomes an error: a panic hook says nothing about it.
pub fn panics_are_expected() -> bool {
    EXPECTED.with(Cell::get)
}

/// Calls into the library; a panic's message is the error.
pub(super) fn catch<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    let before = EXPECTED.with(|expected| expected.replace(true));
    // Only caches of the library are left half-done, and it takes their locks with `try_`.
    let result = catch_unwind(AssertUnwindSafe(call));
    EXPECTED.with(|expected| expected.set(before));
    result.map_err(|panic| format!("the tokenizer library panicked: {}", message(&*panic)))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_expected_only_inside() {
        let result = catch(|| {
            assert!(panics_are_expected());
            if panics_are_expected() {
                panic!("at {}", 3);
            }
        });
        assert_eq!(result, Err("the tokenizer library panicked: at 3".into()));
        assert!(!panics_are_expected());
        assert_eq!(catch(|| 5), Ok(5));
    }
}
