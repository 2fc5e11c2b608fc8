//! States under names.

use std::path::PathBuf;

use object_store::ObjectMeta;
use still_model::SavedSequence;

use super::kept::encode;
use super::store::StateStore;
use super::{StateError, StateInfo, StateList};

/// The longest name.
const LONGEST: usize = 128;
/// The longest header of a state's file: many times that of a state of a hundred layers.
const MOST_HEADER: u64 = 16 << 20;

/// The named states of one model, in a store.
#[derive(Debug)]
pub(crate) struct NamedStates {
    identity: String,
    store: StateStore,
    /// Bytes of all, where the store is this process's memory.
    most_bytes: Option<u64>,
}

/// Checks that a name is short and valid as a file name everywhere.
pub(crate) fn check_name(name: &str) -> Result<(), StateError> {
    let takes = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let fits = (1..=LONGEST).contains(&name.len()) && name.chars().all(takes);
    if fits && !name.starts_with('.') { Ok(()) } else { Err(StateError::InvalidName) }
}

fn file_name(name: &str) -> Result<String, StateError> {
    check_name(name)?;
    Ok(format!("{name}.safetensors"))
}

impl NamedStates {
    /// In a store, or in memory.
    pub fn new(identity: String, store: Option<&StateStore>, memory_bytes: usize) -> Self {
        let most_bytes = store.is_none().then_some(memory_bytes as u64);
        let store = store.cloned().unwrap_or_else(StateStore::in_memory);
        let store = store.below(&identity).below("named");
        Self { identity, store, most_bytes }
    }

    pub async fn save(&self, name: &str, saved: SavedSequence) -> Result<(), StateError> {
        let name = file_name(name)?;
        let bytes = encode(&self.identity, saved).await?;
        self.check_room(&name, bytes.len() as u64).await?;
        self.store.put(&name, bytes).await
    }

    async fn check_room(&self, name: &str, more: u64) -> Result<(), StateError> {
        let Some(most) = self.most_bytes else { return Ok(()) };
        let others = self.store.list().await?;
        let others = others.iter().filter(|(other, _)| other != name);
        let bytes = more + others.map(|(_, meta)| meta.size).sum::<u64>();
        if bytes > most { Err(StateError::Full { most }) } else { Ok(()) }
    }

    pub async fn load(&self, name: &str) -> Result<SavedSequence, StateError> {
        let file = file_name(name)?;
        let bytes = self.store.get(&file).await?;
        let bytes = bytes.ok_or_else(|| StateError::NotFound(name.into()))?;
        let identity = self.identity.clone();
        let path = PathBuf::from(self.store.path(&file).as_ref());
        let decode = move || SavedSequence::decode(&identity, &path, &bytes);
        let decoded = tokio::task::spawn_blocking(decode).await;
        Ok(decoded.map_err(|panic| StateError::Failed(panic.to_string()))??)
    }

    pub async fn get(&self, name: &str) -> Result<StateInfo, StateError> {
        let file = file_name(name)?;
        let meta = self.store.head(&file).await?;
        let meta = meta.ok_or_else(|| StateError::NotFound(name.into()))?;
        self.info(name, &file, &meta).await
    }

    /// Lists all states. A damaged file is listed by name and does not hide the others.
    pub async fn list(&self) -> Result<StateList, StateError> {
        let mut all = StateList::default();
        for (file, meta) in self.store.list().await? {
            let name = file.strip_suffix(".safetensors").filter(|name| check_name(name).is_ok());
            let Some(name) = name else { continue };
            match self.info(name, &file, &meta).await {
                Ok(info) => all.states.push(info),
                Err(error @ StateError::Forged(_)) => {
                    tracing::warn!("a state cannot be listed: {error}");
                    all.damaged.push(name.to_owned());
                }
                // Removed since.
                Err(StateError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        all.states.sort_by(|a, b| a.name.cmp(&b.name));
        all.damaged.sort();
        Ok(all)
    }

    async fn info(
        &self,
        name: &str,
        file: &str,
        meta: &ObjectMeta,
    ) -> Result<StateInfo, StateError> {
        Ok(StateInfo {
            name: name.to_owned(),
            tokens: self.tokens(name, file, meta.size).await?,
            bytes: meta.size,
            modified_unix_seconds: meta.last_modified.timestamp(),
        })
    }

    /// Tokens of a file's state, from its header.
    async fn tokens(&self, name: &str, file: &str, size: u64) -> Result<usize, StateError> {
        let forged = || StateError::Forged(file.to_owned());
        let gone = || StateError::NotFound(name.to_owned());
        if size < 8 {
            return Err(forged());
        }
        let length = self.store.get_range(file, 0..8).await?.ok_or_else(gone)?;
        let length = u64::from_le_bytes(length.try_into().map_err(|_| forged())?);
        let end = length.checked_add(8).filter(|end| *end <= size.min(MOST_HEADER));
        let end = end.ok_or_else(forged)?;
        let header = self.store.get_range(file, 8..end).await?.ok_or_else(gone)?;
        let header: serde_json::Value = serde_json::from_slice(&header).map_err(|_| forged())?;
        let tokens = header["tokens"]["shape"][0].as_u64().ok_or_else(forged)?;
        usize::try_from(tokens).map_err(|_| forged())
    }

    pub async fn fork(&self, from: &str, to: &str) -> Result<StateInfo, StateError> {
        let (from_file, to_file) = (file_name(from)?, file_name(to)?);
        let meta = self.store.head(&from_file).await?;
        let meta = meta.ok_or_else(|| StateError::NotFound(from.into()))?;
        self.check_room(&to_file, meta.size).await?;
        match self.store.copy(&from_file, &to_file).await? {
            true => self.get(to).await,
            false => Err(StateError::NotFound(from.into())),
        }
    }

    pub async fn delete(&self, name: &str) -> Result<(), StateError> {
        match self.store.delete(&file_name(name)?).await? {
            true => Ok(()),
            false => Err(StateError::NotFound(name.into())),
        }
    }
}
