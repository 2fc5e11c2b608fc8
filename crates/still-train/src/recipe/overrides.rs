//! Overrides of single values, and keys that no recipe has.

use toml::{Table, Value};

use super::{Recipe, invalid};
use crate::error::{Result, TrainError};

/// Keys that the default recipe leaves out.
const OPTIONAL: [&str; 6] = [
    "attention.budgets",
    "attention.cap",
    "attention.feature_dim",
    "attention.key_exponents",
    "attention.rows",
    "calibration.cache_fraction",
];

/// Names in the longest key.
const DEPTH: usize = 8;

/// Whether an override says what `key` is, alone or with its section.
pub(super) fn sets(item: &str, key: &str) -> bool {
    let path = item.split('=').next().unwrap_or_default().trim();
    key.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Sets `a.b.c=value`; a value that is not TOML is taken as a string.
pub(super) fn apply_override(table: &mut Table, item: &str) -> Result<()> {
    let malformed = || {
        invalid(format!("cannot read the override \"{}\"", short(item)), "use section.key=value")
    };
    let (path, value) = item.split_once('=').ok_or_else(malformed)?;
    let value = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.trim().to_owned()));
    let keys: Vec<&str> = path.trim().split('.').collect();
    let (last, parents) = keys.split_last().ok_or_else(malformed)?;
    if keys.len() > DEPTH {
        return Err(malformed());
    }
    let mut at = table;
    for key in parents {
        let entry = at.entry((*key).to_owned()).or_insert_with(|| Value::Table(Table::new()));
        at = entry.as_table_mut().ok_or_else(malformed)?;
    }
    at.insert((*last).to_owned(), value);
    Ok(())
}

/// A value whose table is one of several kinds, not a section: it is given whole or not at all.
const KINDS: &str = "attention.feature_map";

/// The recipe's values over the defaults of their own sections: a rate left out of `[transfer.optimizer]` is that of
/// stage 1, whatever else is set there.
pub(super) fn over_defaults(table: Table) -> Result<Table> {
    let mut complete = default_table()?;
    lay_over("", &mut complete, table);
    Ok(complete)
}

fn lay_over(prefix: &str, below: &mut Table, above: Table) {
    for (key, value) in above {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) if path != KINDS => {
                lay_over(&path, below, above);
            }
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

fn default_table() -> Result<Table> {
    Table::try_from(Recipe::default())
        .map_err(|error| invalid(error.to_string(), "this is a defect of still"))
}

/// An error for a key that no recipe has, with the nearest one that it could mean.
pub(super) fn check_keys(table: &Table) -> Result<()> {
    let complete = default_table()?;
    let mut valid: Vec<String> = OPTIONAL.map(str::to_owned).into();
    collect_keys("", &complete, &mut valid);
    let mut given = Vec::new();
    collect_keys("", table, &mut given);
    let is_valid = |key: &String| {
        // Inside a value such as feature_map = { np_map = … } the value's own type decides.
        let known =
            |v: &String| v == key || key.starts_with(&format!("{v}.")) && !is_section(v, &complete);
        valid.iter().any(known)
            || valid.iter().any(|v| v.starts_with(&format!("{key}.")))
            || key.starts_with("attention.feature_map.")
            || key.starts_with("attention.router.")
    };
    let Some(unknown) = given.iter().find(|key| !is_valid(key)) else { return Ok(()) };
    let nearest = valid
        .iter()
        .max_by(|a, b| {
            let near = |v: &str| strsim::jaro_winkler(v, unknown);
            near(a).total_cmp(&near(b))
        })
        .cloned()
        .unwrap_or_default();
    Err(TrainError::Recipe {
        what: format!("unknown key \"{}\"", short(unknown)),
        hint: format!("did you mean \"{nearest}\"?"),
    })
}

/// The beginning of a text that may be long.
fn short(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn is_section(path: &str, complete: &Table) -> bool {
    let mut at = complete;
    for key in path.split('.') {
        match at.get(key) {
            Some(Value::Table(table)) => at = table,
            _ => return false,
        }
    }
    true
}

/// Dotted paths of every leaf and section.
fn collect_keys(prefix: &str, table: &Table, to: &mut Vec<String>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if let Value::Table(table) = value {
            collect_keys(&path, table, to);
        }
        to.push(path);
    }
}
