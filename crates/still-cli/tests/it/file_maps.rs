//! A module's map of its files (`//! | file | …`) names every file, and no other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every source file below a directory that has a map.
fn maps(dir: &Path, found: &mut Vec<(PathBuf, BTreeSet<String>)>) {
    for path in dir.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            maps(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(names) = map(&fs::read_to_string(&path).unwrap())
        {
            found.push((path, names));
        }
    }
}

/// The names in the first column of a map.
fn map(source: &str) -> Option<BTreeSet<String>> {
    let mut lines = source.lines().skip_while(|line| !line.starts_with("//! | file |"));
    lines.next()?;
    let first_cells = lines
        .take_while(|line| line.starts_with("//! |"))
        .filter_map(|line| line.split('|').nth(1).map(str::to_owned));
    Some(first_cells.flat_map(|cell| names_of(&cell)).collect())
}

/// `name` and `name/file.rs` name a module alike.
fn names_of(cell: &str) -> Vec<String> {
    let module = |name: &str| name.split(['/', '.']).next().unwrap_or_default().to_owned();
    cell.split('`').skip(1).step_by(2).map(module).collect()
}

/// The modules beside a file that declares them.
fn modules(file: &Path) -> BTreeSet<String> {
    let entries = file.parent().unwrap().read_dir().unwrap().map(|entry| entry.unwrap().path());
    let modules = entries.filter(|path| {
        let is_source = path.extension().is_some_and(|extension| extension == "rs");
        path != file && (is_source || path.join("mod.rs").exists())
    });
    modules.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn maps_name_every_file() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for entry in crates.read_dir().unwrap() {
        maps(&entry.unwrap().path().join("src"), &mut found);
    }
    assert!(found.len() > 15, "only {} maps", found.len());
    let mut wrong = Vec::new();
    for (file, named) in found {
        let there = modules(&file);
        let missing: Vec<_> = there.difference(&named).collect();
        let gone: Vec<_> = named.difference(&there).collect();
        if !(missing.is_empty() && gone.is_empty()) {
            let file = file.display();
            wrong.push(format!("{file}: not in its map {missing:?}, not there {gone:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
