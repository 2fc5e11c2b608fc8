//! In which keys the recipe of a run that is there differs from the one that is to go on with it.

use std::path::Path;

use toml::{Table, Value};

use super::directory::RECIPE;
use crate::recipe::Recipe;

/// Most keys that are named.
const MOST: usize = 4;
/// Longest value that is shown.
const SHORT: usize = 40;

/// The keys that differ, each with both values; none if the run's recipe is the same, or cannot be read.
pub(super) fn differences(run_dir: &Path, recipe: &Recipe) -> Vec<String> {
    let Ok(text) = still_model::files::read_to_string(&run_dir.join(RECIPE)) else {
        return Vec::new();
    };
    let (Ok(run), Ok(now)) = (text.parse::<Table>(), Table::try_from(recipe)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    compare("", &run, &now, &mut found);
    if found.len() > MOST {
        let more = found.len() - MOST;
        found.truncate(MOST);
        found.push(format!("{more} more"));
    }
    found
}

/// Keys of either, with those of the tables in them, in alphabetical order.
fn compare(path: &str, run: &Table, now: &Table, found: &mut Vec<String>) {
    let mut keys: Vec<&String> = run.keys().chain(now.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys {
        let name = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (run.get(key), now.get(key)) {
            (Some(Value::Table(run)), Some(Value::Table(now))) => compare(&name, run, now, found),
            (run, now) if run != now => {
                found.push(format!("{name} is {}, now {}", word(run), word(now)));
            }
            _ => {}
        }
    }
}

fn word(value: Option<&Value>) -> String {
    match value.map(ToString::to_string) {
        None => "not set".into(),
        Some(text) if text.chars().count() <= SHORT => text,
        Some(_) => "a long value".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_that_differs_is_named_with_both_values() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|&set| set.into()).collect();
            Recipe::parse("", &sets).unwrap()
        };
        let now = recipe(&["transfer.steps=3", "data.lengths=[128, 256]"]);
        assert!(differences(dir.path(), &now).is_empty());
        let save = |recipe: &Recipe| {
            std::fs::write(dir.path().join(RECIPE), toml::to_string_pretty(recipe).unwrap())
        };
        save(&now).unwrap();
        assert!(differences(dir.path(), &now).is_empty());
        save(&recipe(&["transfer.steps=4", "calibration.cache_fraction=0.5", "seed=7"])).unwrap();
        assert_eq!(
            differences(dir.path(), &now),
            [
                "calibration.cache_fraction is 0.5, now not set",
                "data.lengths is [], now [128, 256]",
                "seed is 7, now 0",
                "transfer.steps is 4, now 3",
            ]
        );
        save(&recipe(&[
            "seed=1",
            "data.length=64",
            "transfer.batch=2",
            "finetune.batch=2",
            "transfer.steps=3",
        ]))
        .unwrap();
        let many = differences(dir.path(), &now);
        assert_eq!(many.len(), MOST + 1, "{many:?}");
        assert_eq!(many[MOST], "1 more");
    }
}
