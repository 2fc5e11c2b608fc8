//! Parsing and rendering recurse; they do so on a stack whose size is known, wherever they are called.

use crate::error::{Error, ErrorKind, Result};

/// Enough for [`crate::MAX_NESTING`] and [`crate::render::MAX_DEPTH`] several times over.
const STACK_BYTES: usize = 32 << 20;

pub(crate) fn on_a_large_one<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let failed = |what: String| Error::new(ErrorKind::Limit, what);
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("template".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| failed(format!("no thread to work on: {error}")))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
