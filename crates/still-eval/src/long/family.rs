//! Families of prompts that grow, and the items of one.

use std::ops::RangeInclusive;

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::draft::{Draft, ItemBuilder, LongItem};
use super::fit::{Fit, fit};
use crate::error::{EvalError, Result};
use crate::task::{Item, Question};

/// Units that the first item is tried with.
const FIRST_GUESS: usize = 16;

/// Prompts of one kind.
pub(super) trait Family: Sync {
    /// How many different items there are, if they come from data.
    fn available(&self) -> Option<usize> {
        None
    }

    /// Whether all prompts have the same hay before their first needle: a runner may read that once.
    fn begins_alike(&self) -> bool {
        false
    }

    /// Fewest and most units of an item.
    fn units(&self, index: usize) -> RangeInclusive<usize>;

    /// An item with so many units. It is made again and again until it fits, each time with the same `rng`.
    fn draft(&self, index: usize, units: usize, rng: ChaCha8Rng) -> Draft;
}

impl ItemBuilder<'_> {
    /// As many items as were asked for, each as long as fits. Of data, those that are too long without any hay are left out.
    pub fn items(&self, family: &dyn Family) -> Result<Vec<Item>> {
        let (wanted, available) = (self.options.items, family.available().unwrap_or(usize::MAX));
        let mut items = Vec::with_capacity(wanted);
        let mut needed = usize::MAX;
        let mut index = 0;
        let mut guess = None;
        while items.len() < wanted && index < available {
            // The first that fits tells where the others begin: what they become is then no matter of threads.
            let batch = if guess.is_some() { wanted - items.len() } else { 1 };
            let indices = index..(index + batch).min(available);
            index = indices.end;
            let fitted: Vec<_> = indices
                .into_par_iter()
                .map(|index| Ok((index, self.fitted(family, index, guess.unwrap_or(FIRST_GUESS))?)))
                .collect::<Result<_>>()?;
            for (index, fitted) in fitted {
                match fitted {
                    Fit::Fits { units, made } => {
                        guess.get_or_insert(units);
                        items.push(Item {
                            id: format!("{}-{index}", self.task),
                            group: family.begins_alike().then(|| self.task.to_owned()),
                            question: Question::Generation(Box::new(made)),
                        });
                    }
                    Fit::TooLong(tokens) => needed = needed.min(tokens + self.new_tokens),
                }
            }
            if items.is_empty() && family.available().is_none() {
                break;
            }
        }
        if items.is_empty() {
            let got = self.options.length;
            return Err(EvalError::TooShort { what: self.task, needed, got });
        }
        Ok(items)
    }

    fn fitted(&self, family: &dyn Family, index: usize, guess: usize) -> Result<Fit<LongItem>> {
        let fitted = fit(family.units(index), guess, self.prompt_tokens(), |units| {
            let draft = family.draft(index, units, self.rng(index));
            let prompt_ids = self.encode(&draft)?;
            let tokens = prompt_ids.len();
            Ok(((draft, prompt_ids), tokens))
        })?;
        Ok(match fitted {
            Fit::Fits { units, made: (draft, prompt_ids) } => {
                Fit::Fits { units, made: self.item(draft, prompt_ids)? }
            }
            Fit::TooLong(tokens) => Fit::TooLong(tokens),
        })
    }
}
