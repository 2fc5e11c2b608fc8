//! Text files to windows of token ids, in a seeded order that a resumed run finds again.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use still_model::Tokenizer;

use crate::error::{Result, TrainError};
use crate::recipe::DataRecipe;

/// Tokenized documents cut into windows. Every window begins a sequence: no window spans two documents.
#[derive(Clone, Debug)]
pub struct Windows {
    windows: Vec<Vec<u32>>,
    seed: u64,
    /// Documents that gave at least one window.
    pub documents: usize,
    /// Tokens in all windows.
    pub tokens: usize,
}

/// How far a run has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Windows handed out since the beginning, over all epochs.
    pub windows: usize,
}

impl Windows {
    /// Reads `.txt` (one document), `.jsonl` and `.jsonl.zst` (one document a line, in field `text`).
    ///
    /// # Errors
    /// A file that is missing, of another kind or malformed (with its line); data too small for one window.
    pub fn read(
        paths: &[PathBuf],
        tokenizer: &Tokenizer,
        recipe: &DataRecipe,
        seed: u64,
    ) -> Result<Self> {
        let mut windows = Vec::new();
        let (mut documents, mut seen, mut seen_tokens) = (0, 0, 0);
        for path in paths {
            for_each_document(path, &mut |text| {
                let ids = tokenizer.encode(text, true)?;
                seen += 1;
                seen_tokens += ids.len();
                let before = windows.len();
                let long_enough = |window: &&[u32]| window.len() >= recipe.min_length;
                windows.extend(ids.chunks(recipe.length).filter(long_enough).map(<[u32]>::to_vec));
                documents += usize::from(windows.len() > before);
                Ok(())
            })?;
        }
        if windows.is_empty() {
            return Err(TrainError::Data {
                path: paths.first().cloned().unwrap_or_else(|| "--data".into()),
                what: format!(
                    "too little text: {seen_tokens} tokens in {seen} documents, none of {} tokens",
                    recipe.min_length
                ),
                hint: "give more text, or lower data.min_length".into(),
            });
        }
        let tokens = windows.iter().map(Vec::len).sum();
        Ok(Self { windows, seed, documents, tokens })
    }

    /// From windows made elsewhere.
    pub fn from_windows(windows: Vec<Vec<u32>>, seed: u64) -> Self {
        let tokens = windows.iter().map(Vec::len).sum();
        Self { documents: windows.len(), windows, seed, tokens }
    }

    /// Windows of one epoch.
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// The next `count` windows; each epoch has an order of its own, a function of the seed and its number.
    pub fn next(&self, position: &mut Position, count: usize) -> Vec<&[u32]> {
        let epoch_order = |epoch: usize| {
            let mut order: Vec<usize> = (0..self.windows.len()).collect();
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch as u64);
            order.shuffle(&mut rng);
            order
        };
        let mut current: Option<(usize, Vec<usize>)> = None;
        (0..count)
            .map(|_| {
                let (epoch, at) =
                    (position.windows / self.windows.len(), position.windows % self.windows.len());
                position.windows += 1;
                if current.as_ref().is_none_or(|(known, _)| *known != epoch) {
                    current = Some((epoch, epoch_order(epoch)));
                }
                let index = current.as_ref().map_or(at, |(_, order)| order[at]);
                self.windows[index].as_slice()
            })
            .collect()
    }

    /// About so many tokens, in the order of the first epoch.
    pub fn first_tokens(&self, tokens: usize) -> Vec<&[u32]> {
        let mut left = tokens;
        let mut taken = Vec::new();
        for window in self.next(&mut Position::default(), self.len()) {
            let window = &window[..window.len().min(left)];
            if window.is_empty() {
                break;
            }
            left -= window.len();
            taken.push(window);
        }
        taken
    }

    /// SHA-256 of every window, to notice other data on resume.
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        for window in &self.windows {
            hasher.update((window.len() as u64).to_le_bytes());
            window.iter().for_each(|id| hasher.update(id.to_le_bytes()));
        }
        format!("{:x}", hasher.finalize())
    }
}

fn for_each_document(path: &Path, each: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
    let data_error = |what: String, hint: &str| TrainError::Data {
        path: path.to_path_buf(),
        what,
        hint: hint.into(),
    };
    let open = || File::open(path).map_err(TrainError::read(path));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if name.ends_with(".txt") {
        let mut bytes = Vec::new();
        open()?.read_to_end(&mut bytes).map_err(TrainError::read(path))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            data_error(
                format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to()),
                "convert the file to UTF-8",
            )
        })?;
        return each(&text);
    }
    let reader: Box<dyn Read> = if name.ends_with(".jsonl.zst") {
        Box::new(zstd::Decoder::new(open()?).map_err(TrainError::read(path))?)
    } else if name.ends_with(".jsonl") {
        Box::new(open()?)
    } else {
        return Err(data_error("unknown kind of file".into(), "give .txt, .jsonl or .jsonl.zst"));
    };
    #[derive(Deserialize)]
    struct Document {
        text: String,
    }
    for (number, line) in BufReader::new(reader).lines().enumerate() {
        let line = line.map_err(|error| {
            data_error(format!("line {}: {error}", number + 1), "the file is damaged or incomplete")
        })?;
        if line.trim().is_empty() {
            continue;
        }
        let document: Document = serde_json::from_str(&line).map_err(|error| {
            data_error(
                format!("line {}: {error}", number + 1),
                "each line must be a JSON object with a string field \"text\"",
            )
        })?;
        each(&document.text)?;
    }
    Ok(())
}
