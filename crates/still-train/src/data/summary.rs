//! What was read, in one line.

use std::fmt;

/// How much data there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSummary {
    /// Documents that are trained on.
    pub documents: usize,
    /// Their tokens, each counted once.
    pub tokens: usize,
    /// Windows of an epoch, with the most tokens that one has.
    pub windows: Vec<(usize, usize)>,
    /// Whether a window may hold several documents.
    pub packed: bool,
    /// Documents that are held out, or of the held-out files.
    pub heldout_documents: usize,
    /// Held-out windows that are kept for evaluation.
    pub heldout_windows: usize,
}

impl fmt::Display for DataSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}: ", count(self.tokens, "token"), count(self.documents, "document"))?;
        for (n, (length, windows)) in self.windows.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{} of {length}", count(*windows, "window"))?;
        }
        if self.packed {
            f.write_str(", packed")?;
        }
        if self.heldout_windows > 0 {
            let (windows, documents) = (self.heldout_windows, self.heldout_documents);
            let of = count(documents, "document");
            write!(f, "; {} of {of} held out", count(windows, "window"))?;
        }
        Ok(())
    }
}

/// `12 tokens`, `1.63 M tokens`.
fn count(number: usize, of: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    let (x, unit) = match number as f64 {
        x if x < 1e5 => return format!("{number} {of}{plural}"),
        x if x < 1e6 => (x / 1e3, "k"),
        x if x < 1e9 => (x / 1e6, "M"),
        x => (x / 1e9, "B"),
    };
    let digits = if x < 100.0 { 2 } else { 0 };
    format!("{x:.digits$} {unit} {of}{plural}")
}
