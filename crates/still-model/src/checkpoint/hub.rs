//! Models, adapters and deltas of a hub, fetched into its cache.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo};

use super::OnFetch;
use super::authors::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use super::form::BASE_KEY;
use super::safetensors_dir::{read_json, shards};
use super::target::DELTA_FILE;
use crate::chat::{TEMPLATE_DIR, TEMPLATE_FILE};
use crate::error::{ModelError, Result};

/// Files that not every model has.
const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", TEMPLATE_FILE];
const HINT: &str = "check the id and the network, or give the path of a downloaded model";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Fetches the files of a model, an adapter or a delta; returns the snapshot's directory.
///
/// # Errors
/// A file that a model must have and the repository has not; any file that is there and could not be fetched.
pub(super) fn fetch(id: &str, on_fetch: &OnFetch) -> Result<PathBuf> {
    let api = ApiBuilder::from_env().with_progress(false).with_retries(0).build();
    let api = api.map_err(|error| ModelError::NotFound {
        what: format!("no model at {id}, and the hub cannot be used: {error}"),
        hint: HINT.into(),
    })?;
    let cached = Cache::from_env().model(id.to_owned());
    let known = [CONFIG, ADAPTER_CONFIG].iter().find_map(|file| cached.get(file));
    let snapshot = known.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let repo = api.model(id.to_owned());
    let mut repo = Repo { id, repo, cache: cached, on_fetch, snapshot };
    let config = repo.get_if_there(CONFIG)?;
    // A model whose weights are here was asked for its adapter before them.
    let adapter = match [WEIGHTS, INDEX].iter().any(|file| repo.cache.get(file).is_some()) {
        true => repo.cache.get(ADAPTER_CONFIG),
        false => repo.get_if_there(ADAPTER_CONFIG)?,
    };
    let first = match config.as_ref().or(adapter.as_ref()) {
        Some(file) => file.clone(),
        None => repo.get(CONFIG)?,
    };
    let snapshot = first.parent().map(Path::to_path_buf).unwrap_or_default();
    repo.snapshot = Some(snapshot.clone());
    for (file, found) in [(CONFIG, &config), (ADAPTER_CONFIG, &adapter)] {
        if found.is_none() {
            remember(repo.absent_marker(file));
        }
    }
    if adapter.is_some() {
        repo.get_if_there(ADAPTER_WEIGHTS)?;
    }
    // An adapter may be alone, and a delta is: tokenizer and weights are those of a base elsewhere.
    let Some(config) = config else { return Ok(snapshot) };
    if !read_json(&config)?[BASE_KEY].is_null() {
        repo.get(DELTA_FILE)?;
        return Ok(snapshot);
    }
    let get = |file: &str| match adapter {
        Some(_) => repo.get_if_there(file).map(drop),
        None => repo.get(file).map(drop),
    };
    get("tokenizer.json")?;
    for file in OPTIONAL {
        repo.get_if_there(file)?;
    }
    repo.get_templates()?;
    match repo.get_if_there(INDEX)? {
        Some(index) => {
            for shard in shards(&index)? {
                repo.get(&shard)?;
            }
        }
        None => get(WEIGHTS)?,
    }
    Ok(snapshot)
}

struct Repo<'a> {
    id: &'a str,
    repo: ApiRepo,
    cache: CacheRepo,
    on_fetch: &'a OnFetch,
    /// Where its files are, once one of them is here.
    snapshot: Option<PathBuf>,
}

impl Repo<'_> {
    fn failed(&self, file: &str, error: &ApiError) -> ModelError {
        ModelError::NotFound {
            what: format!(
                "no model at {}, and {file} could not be fetched from the hub: {error}",
                self.id
            ),
            hint: HINT.into(),
        }
    }

    fn get(&self, file: &str) -> Result<PathBuf> {
        self.find(file).map_err(|error| self.failed(file, &error))
    }

    fn find(&self, file: &str) -> std::result::Result<PathBuf, ApiError> {
        self.on_fetch.get(&self.cache, &self.repo, file)
    }

    /// A file that the repository need not have. That it has none is remembered as the hub's own library does it, so that
    /// a model that was fetched once opens without a network.
    fn get_if_there(&self, file: &str) -> Result<Option<PathBuf>> {
        let marker = self.absent_marker(file);
        if marker.as_ref().is_some_and(|marker| marker.exists()) {
            return Ok(None);
        }
        match self.find(file) {
            Ok(path) => Ok(Some(path)),
            Err(error) if is_absent(&error) => {
                remember(marker);
                Ok(None)
            }
            Err(error) => Err(self.failed(file, &error)),
        }
    }

    /// Templates besides the default one, which only a list of the repository's files can name.
    fn get_templates(&self) -> Result<()> {
        let marker = self.absent_marker(TEMPLATE_DIR);
        if marker.as_ref().is_some_and(|marker| marker.exists()) {
            return Ok(());
        }
        let info = match self.repo.info() {
            Ok(info) => info,
            // A hub that keeps no lists has no more than the files that are known by name.
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(self.failed(TEMPLATE_DIR, &error)),
        };
        let inside = |name: &&str| {
            let file = name.strip_prefix(TEMPLATE_DIR).and_then(|rest| rest.strip_prefix('/'));
            file.is_some_and(|file| file.ends_with(".jinja") && !file.contains('/'))
        };
        let names = info.siblings.iter().map(|sibling| sibling.rfilename.as_str());
        let templates: Vec<&str> = names.filter(inside).collect();
        for file in &templates {
            self.get(file)?;
        }
        if templates.is_empty() {
            remember(marker);
        }
        Ok(())
    }

    /// `.no_exist/COMMIT/FILE` next to `snapshots`.
    fn absent_marker(&self, file: &str) -> Option<PathBuf> {
        let snapshot = self.snapshot.as_deref()?;
        let repository = snapshot.parent()?.parent()?;
        Some(repository.join(".no_exist").join(snapshot.file_name()?).join(file))
    }
}

/// Whether the hub said that a repository has no such file, rather than nothing or something else.
fn is_absent(error: &ApiError) -> bool {
    matches!(error, ApiError::RequestError(error) if matches!(**error, ureq::Error::Status(404, _)))
}

/// A cache that cannot be written is asked again next time.
fn remember(marker: Option<PathBuf>) {
    if let Some(marker) = marker
        && let Some(parent) = marker.parent()
    {
        let _ = std::fs::create_dir_all(parent).and_then(|()| std::fs::File::create(&marker));
    }
}
