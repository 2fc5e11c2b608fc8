//! The measurements of a verdict, and their text.

use still_attention::RowDtype;
use still_eval::long::{LongFiles, LongOptions, LongTask};
use still_eval::task::{Task, WindowOptions, id_windows, windows};
use still_eval::{EvalError, Measured, ModelBench, Yardstick};
use still_model::{Model, Tokenizer};

use crate::books;
use crate::printer::Printer;
use crate::progress::{Bar, ReadingBar};

/// The task of held-out windows.
pub const HELDOUT: &str = "heldout";
/// The task of a random sequence that is read twice.
pub const REPEATED: &str = "repeated_text";
/// Tokens of both copies.
const REPEATED_TOKENS: usize = 1024;
/// Decode steps that are timed.
const DECODE_STEPS: usize = 24;
/// Tokens of a prompt that tells a model's speed beforehand.
const TRIAL: usize = 512;

/// How much is measured of each model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Tokens of a held-out window, of a pass-key prompt, and of the context at which speed is timed.
    pub length: usize,
    /// Held-out windows.
    pub windows: usize,
    /// Pass keys.
    pub keys: usize,
}

/// From much to little.
const SIZES: [Size; 5] = [
    Size { length: 4096, windows: 4, keys: 4 },
    Size { length: 2048, windows: 4, keys: 4 },
    Size { length: 2048, windows: 2, keys: 2 },
    Size { length: 1024, windows: 2, keys: 2 },
    Size { length: 512, windows: 1, keys: 1 },
];

impl Size {
    /// Tokens that a model reads.
    fn tokens(self) -> usize {
        // Each pass key's prompt is read once up to its needle, and again from there on.
        self.length * self.windows
            + self.length * (2 + self.keys) / 2
            + REPEATED_TOKENS
            + self.length
    }

    /// The largest that three models measure in about `seconds`, the slowest reading `tokens_per_s`, within a context of `most`
    /// tokens; the smallest one that there is if none does.
    pub fn fitting(seconds: f64, tokens_per_s: f64, most: usize) -> Self {
        let fits = |size: &&Self| {
            size.length <= most && 3.0 * size.tokens() as f64 <= seconds * tokens_per_s
        };
        let smallest = SIZES[SIZES.len() - 1];
        *SIZES.iter().find(fits).unwrap_or(&smallest)
    }
}

/// Tokens a second that a model reads: of a short prompt, after a warm-up.
///
/// # Errors
/// An error of the model.
pub fn trial(model: &Model) -> still_eval::Result<f64> {
    let bench = ModelBench::new(model, 1, usual_rows(model))?;
    Ok(bench.time(TRIAL.min(model.config().max_position_embeddings), 1)?.prefill_tokens_per_s)
}

/// How a model's cache stores exact rows unless told otherwise: as `still chat` does.
pub fn usual_rows(model: &Model) -> RowDtype {
    model.cache_rows(RowDtype::Bf16)
}

/// Held-out windows, as many as `size` has tokens: of a run's own `heldout` sequences, or else of the book that ships with
/// `still`. And where they are from.
///
/// # Errors
/// If the tokenizer fails.
pub fn heldout(
    heldout: &[Vec<u32>],
    tokenizer: &Tokenizer,
    size: Size,
) -> still_eval::Result<(Task, String)> {
    let mut left = size.length * size.windows;
    let mut own = Vec::new();
    for ids in heldout {
        let ids = &ids[..ids.len().min(size.length).min(left)];
        // A window predicts from its second token on.
        if ids.len() > 1 {
            own.push(ids.to_vec());
            left -= ids.len();
        }
    }
    let tokens = |task: &Task| (task.items.len(), crate::table::count(size.length));
    if !own.is_empty() {
        let task = id_windows(HELDOUT, own);
        let (windows, length) = tokens(&task);
        return Ok((
            task,
            match windows {
                1 => format!("1 window of the run's data, up to {length} tokens"),
                _ => format!("{windows} windows of the run's data, up to {length} tokens each"),
            },
        ));
    }
    let task = book_windows(tokenizer, size.length, size.windows)?;
    let (windows, length) = tokens(&task);
    Ok((task, format!("{windows} × {length} tokens of {}", books::HELDOUT.title)))
}

/// The first windows of the book that ships with `still`, as many as it has of at most `count`.
///
/// # Errors
/// If the tokenizer fails.
pub fn book_windows(
    tokenizer: &Tokenizer,
    length: usize,
    count: usize,
) -> still_eval::Result<Task> {
    let options = WindowOptions { length, stride: None, limit: Some(count) };
    Ok(Task { name: HELDOUT.into(), ..windows(books::HELDOUT.text, tokenizer, &options)? })
}

/// What a run's models are measured by. Pass keys are left out where a prompt of `size` holds none.
///
/// # Errors
/// If the tokenizer fails.
pub fn yardstick(
    model: &Model,
    heldout: Task,
    size: Size,
    seed: u64,
) -> still_eval::Result<Yardstick> {
    let build = |task: LongTask, length, items| {
        let options = LongOptions { length, items, seed, chat: false };
        let (tokenizer, vocab_size) = (&model.tokenizer, model.config().vocab_size);
        match task.build(tokenizer, vocab_size, &LongFiles::default(), options) {
            Err(EvalError::TooShort { .. }) => Ok(None),
            built => built.map(Some),
        }
    };
    let repeated = REPEATED_TOKENS.min(size.length);
    let long = [
        build(LongTask::Passkey, size.length, size.keys)?,
        build(LongTask::RepeatedText, repeated, 1)?,
    ];
    Ok(Yardstick {
        document: None,
        tasks: std::iter::once(heldout).chain(long.into_iter().flatten()).collect(),
        contexts: vec![size.length],
        decode_steps: DECODE_STEPS,
    })
}

/// Measures a model, with a bar while it reads a document and one while it answers.
///
/// # Errors
/// As [`Yardstick::measure`].
pub fn measure(
    yardstick: &Yardstick,
    name: &str,
    model: &Model,
    printer: &Printer,
) -> still_eval::Result<Measured> {
    let reading = ReadingBar::of_document(printer, name.to_owned());
    let document = reading.clone();
    let bar = std::cell::OnceCell::new();
    let make = || {
        let bar = Bar::new(printer, "Evaluating", name, yardstick.items(), "items");
        if !yardstick.contexts.is_empty() {
            // What follows the last item.
            bar.message("then its speed");
        }
        bar
    };
    // Two bars at a time would share a line.
    if yardstick.document.is_none() {
        let _ = bar.set(make());
    }
    let bar = std::sync::Mutex::new(bar);
    let answered = || {
        reading.done();
        let bar = bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        bar.get_or_init(make).advance(1);
    };
    let measured = yardstick.measure(model, usual_rows(model), &document.listener(), &answered)?;
    let bar = bar.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(bar) = bar.into_inner() {
        bar.done(format_args!("{name}:"));
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use still_model::random::{random_model, tiny_config};

    use super::*;

    #[test]
    fn the_largest_size_that_fits_is_taken() {
        assert_eq!(Size::fitting(45.0, 1e6, 8192), SIZES[0]);
        assert_eq!(Size::fitting(45.0, 1e6, 2048), SIZES[1]);
        let slow = Size::fitting(20.0, 500.0, 8192);
        assert!(slow.length < 4096 && 3 * slow.tokens() <= 10_000, "{slow:?}");
        assert_eq!(Size::fitting(1.0, 1.0, 8192), SIZES[4]);
        assert_eq!(Size::fitting(45.0, 1e6, 16), SIZES[4]);
    }

    #[test]
    fn a_runs_own_text_comes_first_and_is_bounded() {
        let model = random_model(tiny_config(), 1).unwrap();
        let size = SIZES[4];
        let own = [vec![1; 400], vec![2; 1], vec![3; 400]];
        let (task, from) = heldout(&own, &model.tokenizer, size).unwrap();
        assert_eq!(task.items.len(), 2);
        assert!(from.contains("run's data"), "{from}");
        let (task, from) = heldout(&[], &model.tokenizer, size).unwrap();
        assert_eq!((task.name.as_str(), task.items.len()), (HELDOUT, 1));
        assert!(from.contains(books::HELDOUT.title), "{from}");
    }
}
