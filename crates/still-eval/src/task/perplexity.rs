//! Perplexity of a text in windows, side by side or sliding.

use still_model::Tokenizer;

use super::{Metric, Task, Window};
use crate::error::{EvalError, Result};

/// How a text is cut into windows.
#[derive(Clone, Copy, Debug)]
pub struct WindowOptions {
    /// Tokens of a window.
    pub length: usize,
    /// Tokens from one window's start to the next. Without it, windows lie side by side and every token but a window's
    /// first is scored. With it, a window scores only tokens that no earlier one has, all with at least
    /// `length − stride` tokens before them (but for the first window's).
    pub stride: Option<usize>,
    /// The first so many windows.
    pub limit: Option<usize>,
}

/// The task `perplexity_LENGTH`, with a stride `perplexity_LENGTH_stride_STRIDE`. A rest that fills no window is left out.
///
/// # Errors
/// Options out of range; a text that fills no window.
pub fn windows(text: &str, tokenizer: &Tokenizer, options: &WindowOptions) -> Result<Task> {
    let WindowOptions { length, stride, limit } = *options;
    if length < 2 || stride.is_some_and(|stride| stride == 0 || stride >= length) {
        return Err(EvalError::Argument(format!(
            "windows of {length} tokens{}: a window needs 2 tokens, and a stride is from 1 to less than the window",
            stride.map_or(String::new(), |stride| format!(", {stride} apart")),
        )));
    }
    let (ids, spans) = tokenizer.encode_with_offsets(text, true)?;
    if ids.len() < length {
        return Err(EvalError::TooShort { what: "perplexity", needed: length, got: ids.len() });
    }
    let step = stride.unwrap_or(length);
    let items = (0..=ids.len() - length)
        .step_by(step)
        .take(limit.unwrap_or(usize::MAX))
        .enumerate()
        .map(|(n, start)| {
            let scored_from = match stride {
                Some(stride) if n > 0 => length - stride,
                _ => 1,
            };
            // From the end of the token before: some tokenizers leave a token's space out of its span.
            let (before, last) = (spans[start + scored_from - 1], spans[start + length - 1]);
            let window = Window {
                ids: ids[start..start + length].to_vec(),
                scored_from,
                bytes: Some(last.1.saturating_sub(before.1)),
            };
            window.item(n.to_string())
        })
        .collect();
    let name = match stride {
        None => format!("perplexity_{length}"),
        Some(stride) => format!("perplexity_{length}_stride_{stride}"),
    };
    Ok(Task { name, items, metrics: vec![Metric::Perplexity], length: Some(length) })
}

/// Windows of token ids, each scored but for its first token: a text that is tokenized already.
pub fn id_windows(name: &str, windows: impl IntoIterator<Item = Vec<u32>>) -> Task {
    let item = |(n, ids): (usize, Vec<u32>)| {
        Window { ids, scored_from: 1, bytes: None }.item(n.to_string())
    };
    let items = windows.into_iter().enumerate().map(item).collect();
    Task { name: name.into(), items, metrics: vec![Metric::Perplexity], length: None }
}
