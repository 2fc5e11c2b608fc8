//! Progress bars of downloads.

use std::sync::{Mutex, PoisonError};

use still_model::{Fetched, OnFetch};

use crate::printer::Printer;
use crate::progress::Bar;
use crate::table::file_bytes;

/// A smaller file leaves no line.
const WORTH_A_LINE: u64 = 1 << 20;

/// A bar for each file that is fetched, with bytes, their rate and the time left; a line where a large one is here.
pub fn bars(printer: &Printer) -> OnFetch {
    let printer = printer.clone();
    let bar = Mutex::new(None::<Bar>);
    OnFetch::new(move |fetched: Fetched<'_>| {
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        let Fetched { file, bytes, of, before } = fetched;
        if bytes == before {
            let begun = Bar::bytes(&printer, "Fetching", file, of);
            begun.done_before(before as usize);
            *bar = Some(begun);
        }
        if let Some(bar) = bar.as_ref() {
            bar.reach(bytes as usize);
        }
        if bytes >= of
            && let Some(bar) = bar.take()
            && of >= WORTH_A_LINE
        {
            bar.done(format_args!("{file}: {}", file_bytes(of)));
        }
    })
}
