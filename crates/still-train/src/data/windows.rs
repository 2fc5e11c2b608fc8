//! The windows of a run.

use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use still_model::Tokenizer;

use super::cache::{Identified, TokenCache};
use super::cut::{Group, Piece, blocks, views};
use super::documents::data_error;
use super::heldout;
use super::lengths::Schedule;
use super::order::{Orders, Position, Purpose, shuffled};
use super::summary::DataSummary;
use super::tokenize::TextOptions;
use super::tokens::TokenFile;
use super::window::Window;
use crate::error::{Result, TrainError};
use crate::recipe::{DataRecipe, LossOn};

/// Draws that a mix of sources is planned for at the least, so that weights do not suffer from rounding.
const LEAST_DRAWS: usize = 1000;

/// Tokenized documents cut into windows. No sequence spans two documents; a window holds several only if packed.
#[derive(Clone, Debug)]
pub struct Windows {
    files: Vec<TokenFile>,
    schedule: Schedule,
    /// By length.
    views: Vec<View>,
    seed: u64,
    packed: bool,
    heldout: Vec<Window>,
    heldout_documents: usize,
    heldout_sha256: String,
    orders: Arc<Orders>,
    longest: usize,
    /// Documents that gave at least one window.
    pub documents: usize,
    /// Tokens that are read, each counted once.
    pub tokens: usize,
}

/// The windows of one length.
#[derive(Clone, Debug)]
struct View {
    groups: Vec<Group>,
    /// Draws from each group in a round.
    draws: Vec<usize>,
    /// Times that a round reads as many tokens as the groups have.
    epochs_of_round: usize,
}

impl Windows {
    /// Reads `.txt` (one document), `.jsonl` and `.jsonl.zst` (one document or conversation a line) and `.bin` (token
    /// ids, in the format of the cache). Text that is not in the cache is tokenized into it.
    ///
    /// # Errors
    /// A file that is missing, of another kind or malformed (with its line); data too small for one window of each
    /// length and source; a cache that cannot be written.
    pub fn read(
        paths: &[PathBuf],
        tokenizer: &Tokenizer,
        recipe: &DataRecipe,
        seed: u64,
        cache: &TokenCache,
    ) -> Result<Self> {
        recipe.validate()?;
        refuse_weights(paths, recipe)?;
        let tokenizer = Identified::new(tokenizer)?;
        let options = TextOptions {
            text_field: recipe.text_field.clone(),
            loss_on: recipe.loss_on,
            max_line_bytes: recipe.max_line_bytes,
            max_word_bytes: recipe.max_word_bytes,
        };
        let open = |path: &PathBuf| {
            let file = cache.open(path, &tokenizer, &options)?;
            Ok(if recipe.loss_on == LossOn::All { file.counting_all() } else { file })
        };
        let files: Vec<TokenFile> = paths.iter().map(open).collect::<Result<_>>()?;
        let apart: Vec<TokenFile> = recipe.heldout_files.iter().map(open).collect::<Result<_>>()?;

        let held = (recipe.heldout > 0.0)
            .then(|| heldout::choose(&files, recipe.heldout, recipe.min_length, seed));
        let is_held = |source: usize, document: usize| {
            held.as_ref().is_some_and(|held| held[source][document])
        };
        let schedule = Schedule::new(recipe);
        let (longest, min_length) = (schedule.longest(), recipe.min_length);
        let (trained, documents) =
            blocks(&files, |source, document| !is_held(source, document), longest, min_length);
        if trained.is_empty() {
            let held =
                held.as_ref().map_or(0, |held| held.iter().flatten().filter(|&&h| h).count());
            return Err(too_little(paths, &files, held, recipe));
        }
        let views: Vec<View> = views(&files, &trained, &schedule, recipe, seed)
            .into_iter()
            .map(|groups| View::new(groups, &recipe.weights))
            .collect();
        refuse_gaps(paths, &views, &schedule, recipe)?;

        let (from_files, of_files) = blocks(&apart, |_, _| true, longest, min_length);
        if let ([], Some(path)) = (from_files.as_slice(), recipe.heldout_files.first()) {
            let what = format!("too little text: no document of {min_length} tokens");
            return Err(data_error(path, what, "give more text, or lower data.min_length"));
        }
        let (from_documents, of_documents) = blocks(&files, is_held, longest, min_length);
        let aside = [(files.as_slice(), from_documents), (apart.as_slice(), from_files)];
        let heldout = heldout_windows(aside, recipe.heldout_windows, seed);
        Ok(Self {
            documents,
            tokens: trained.iter().map(|piece| piece.length as usize).sum(),
            longest: trained.iter().map(|piece| piece.length as usize).max().unwrap_or(0),
            heldout_documents: of_documents + of_files,
            heldout_sha256: combined(&apart),
            files,
            schedule,
            views,
            seed,
            packed: recipe.pack,
            heldout,
            orders: Arc::default(),
        })
    }

    /// From windows made elsewhere, one sequence each.
    pub fn from_windows(windows: Vec<Vec<u32>>, seed: u64) -> Self {
        let file = TokenFile::from_documents(windows.iter().map(Vec::as_slice));
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let files = vec![file];
        let (pieces, documents) = blocks(&files, |_, _| true, longest, 1);
        Self {
            documents,
            tokens: windows.iter().map(Vec::len).sum(),
            longest,
            files,
            schedule: Schedule::single(longest),
            views: vec![View::new(vec![Group::plain(pieces)], &[])],
            seed,
            packed: false,
            heldout: Vec::new(),
            heldout_documents: 0,
            heldout_sha256: String::new(),
            orders: Arc::default(),
        }
    }

    /// The same windows with others to evaluate on.
    pub fn with_heldout(mut self, heldout: Vec<Window>) -> Self {
        self.heldout_documents = heldout.len();
        self.heldout = heldout;
        self
    }

    /// Windows of one epoch, of all lengths.
    pub fn len(&self) -> usize {
        self.views.iter().map(View::windows).sum()
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next `count` windows, all of one length: that of the step.
    ///
    /// Each epoch of each length has an order of its own. What comes is a function of the seed and the position alone,
    /// and costs the same wherever the run is.
    pub fn next(&self, position: &mut Position, count: usize) -> Vec<Window> {
        let (view, first) = self.skip(position, count);
        (first..first + count).map(|n| self.window(view, n)).collect()
    }

    /// So many tokens of the first epoch's first windows, or all there are.
    pub fn first_tokens(&self, tokens: usize) -> Vec<Vec<u32>> {
        let mut position = Position::default();
        let mut left = tokens;
        let mut taken = Vec::new();
        for _ in 0..self.len() {
            for window in self.next(&mut position, 1) {
                taken.push(window.ids()[..window.len().min(left)].to_vec());
                left -= window.len().min(left);
            }
            if left == 0 {
                break;
            }
        }
        taken
    }

    /// [`Windows::next`], one window after the other.
    pub(crate) fn next_one_by_one(
        &self,
        position: &mut Position,
        count: usize,
    ) -> impl Iterator<Item = Window> + '_ {
        let (view, first) = self.skip(position, count);
        (first..first + count).map(move |n| self.window(view, n))
    }

    /// Moves on as [`Windows::next`] does, without reading: the length's index and its windows handed out before.
    fn skip(&self, position: &mut Position, count: usize) -> (usize, usize) {
        let view = self.schedule.at(self.seed, position.steps);
        let first = position.drawn[view];
        position.drawn[view] += count;
        position.windows += count;
        position.steps += 1;
        (view, first)
    }

    /// The `n`-th window of a length, over all epochs.
    fn window(&self, index: usize, n: usize) -> Window {
        let view = &self.views[index];
        let round: usize = view.draws.iter().sum();
        let (group, n) = if view.groups.len() == 1 {
            (0, n)
        } else {
            let epoch = n / round;
            let draws = self.orders.draws(&view.draws, self.seed, index, epoch);
            let (group, before) = draws[n % round];
            (group as usize, epoch * view.draws[group as usize] + before as usize)
        };
        let windows = &view.groups[group];
        let purpose = Purpose::Order { view: index, group };
        let order = self.orders.order(windows.len(), self.seed, purpose, n / windows.len());
        read(&self.files, windows.window(order[n % windows.len()] as usize))
    }

    /// Windows to evaluate on, never trained on: at most `data.heldout_windows`, of the longest length or a document's
    /// end, one sequence each, drawn by the seed from the held-out documents and files. Empty if nothing is held out.
    pub fn heldout(&self) -> &[Window] {
        &self.heldout
    }

    /// Epochs read at a position: tokens read over the tokens there are.
    pub fn epochs(&self, position: &Position) -> f64 {
        let read = self.views.iter().zip(position.drawn).map(|(view, drawn)| {
            let round: usize = view.draws.iter().sum();
            let rounds = drawn as f64 / round.max(1) as f64;
            rounds * (view.epochs_of_round as u64 * view.tokens()) as f64
        });
        read.sum::<f64>() / self.tokens.max(1) as f64
    }

    /// The position after so many steps of so many windows each: `[(steps, windows)]`, stage by stage.
    pub fn position_after(&self, stages: &[(usize, usize)]) -> Position {
        let mut position = Position::default();
        for &(steps, windows) in stages {
            (0..steps).for_each(|_| {
                self.skip(&mut position, windows);
            });
        }
        position
    }

    /// How much there is.
    pub fn summary(&self) -> DataSummary {
        let windows = self.schedule.lengths.iter().zip(&self.views);
        DataSummary {
            documents: self.documents,
            tokens: self.tokens,
            windows: windows.map(|(&length, view)| (length, view.windows())).collect(),
            packed: self.packed,
            heldout_documents: self.heldout_documents,
            heldout_windows: self.heldout.len(),
        }
    }

    /// SHA-256 of the token ids of every source, to notice other data on resume. The ids of a cache are not read for
    /// it; how they become windows is the recipe's to say.
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(combined(&self.files));
        hasher.update(&self.heldout_sha256);
        format!("{:x}", hasher.finalize())
    }
}

/// Weights are one a file.
fn refuse_weights(paths: &[PathBuf], recipe: &DataRecipe) -> Result<()> {
    if !recipe.weights.is_empty() && recipe.weights.len() != paths.len() {
        return Err(TrainError::Recipe {
            what: format!(
                "data.weights has {} values for {} files",
                recipe.weights.len(),
                paths.len()
            ),
            hint: "give one weight for each file, in the order of --data".into(),
        });
    }
    Ok(())
}

/// So many of the pieces that were set aside, in a random order.
fn heldout_windows(aside: [(&[TokenFile], Vec<Piece>); 2], count: usize, seed: u64) -> Vec<Window> {
    let aside: Vec<(&[TokenFile], Piece)> = (aside.into_iter())
        .flat_map(|(files, pieces)| pieces.into_iter().map(move |piece| (files, piece)))
        .collect();
    shuffled(aside.len(), seed, Purpose::HeldOut, 0)
        .into_iter()
        .take(count)
        .map(|n| aside[n as usize])
        .map(|(files, piece)| read(files, &[piece]))
        .collect()
}

impl View {
    /// Without weights there is one group, and an epoch is a round.
    fn new(groups: Vec<Group>, weights: &[f64]) -> Self {
        if weights.is_empty() {
            let draws = groups.iter().map(Group::len).collect();
            return Self { groups, draws, epochs_of_round: 1 };
        }
        let windows: usize = groups.iter().map(Group::len).sum();
        let tokens: u64 = groups.iter().map(|group| group.tokens).sum();
        let epochs_of_round = LEAST_DRAWS.div_ceil(windows.max(1));
        let there = |(group, _): &(&Group, &f64)| group.len() > 0;
        let sum: f64 = groups.iter().zip(weights).filter(there).map(|(_, weight)| weight).sum();
        let draws = groups.iter().zip(weights).map(|(group, weight)| {
            if group.len() == 0 {
                return 0;
            }
            // Tokens of the group in a round, over the tokens of its windows.
            let share = weight / sum * (epochs_of_round as u64 * tokens) as f64;
            let draws = share * group.len() as f64 / group.tokens as f64;
            (draws.round() as usize).max(1)
        });
        Self { draws: draws.collect(), groups, epochs_of_round }
    }

    fn windows(&self) -> usize {
        self.groups.iter().map(Group::len).sum()
    }

    fn tokens(&self) -> u64 {
        self.groups.iter().map(|group| group.tokens).sum()
    }
}

fn read(files: &[TokenFile], pieces: &[Piece]) -> Window {
    let mut window = Window::default();
    for piece in pieces {
        let file = &files[piece.source as usize];
        window.push(&file.ids(piece.range()), file.counted(piece.range()).as_deref());
    }
    window
}

fn combined(files: &[TokenFile]) -> String {
    files.iter().map(TokenFile::sha256).collect()
}

/// Why nothing can be trained on.
fn too_little(
    paths: &[PathBuf],
    files: &[TokenFile],
    held: usize,
    recipe: &DataRecipe,
) -> TrainError {
    let documents: usize = files.iter().map(TokenFile::documents).sum();
    let tokens: usize = files.iter().map(TokenFile::tokens).sum();
    let answers = match recipe.loss_on {
        LossOn::All => "",
        LossOn::Answers => " and an answer",
    };
    let mut what = format!(
        "too little text: {tokens} tokens in {documents} documents, none of {} tokens{answers}",
        recipe.min_length
    );
    let mut hint = "give more text, or lower data.min_length";
    if held > 0 {
        what += &format!(" beside the {held} held out");
        hint = "give more documents, or hold out files of their own (data.heldout_files)";
    }
    data_error(&first(paths), what, hint)
}

/// An error if a length or a weighted file has no window.
fn refuse_gaps(
    paths: &[PathBuf],
    views: &[View],
    schedule: &Schedule,
    recipe: &DataRecipe,
) -> Result<()> {
    let empty = |(view, _): &(&View, &usize)| view.windows() == 0;
    if let Some((_, length)) = views.iter().zip(&schedule.lengths).rev().find(empty) {
        return Err(data_error(
            &first(paths),
            format!("too little text for windows of {length} tokens"),
            "give more or longer documents, pack short ones (data.pack), or leave the length out",
        ));
    }
    let unread = |source: &usize| views.iter().all(|view| view.groups[*source].len() == 0);
    if let Some(source) = (0..recipe.weights.len()).find(unread) {
        let what = format!("too little text: no document of {} tokens", recipe.min_length);
        let hint = "give more text, lower data.min_length, or leave the file out";
        return Err(data_error(&paths[source], what, hint));
    }
    Ok(())
}

fn first(paths: &[PathBuf]) -> PathBuf {
    paths.first().cloned().unwrap_or_else(|| "--data".into())
}
