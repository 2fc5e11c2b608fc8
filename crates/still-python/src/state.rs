//! The attention state of a sequence.
//!
//! A call works on a copy and replaces the state when it is done. An error or Ctrl-C leaves the state unchanged.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use pyo3::prelude::*;
use serde::{Deserialize, Serialize};
use still_attention::RowDtype;
use still_model::tensor_file::{Entry, read_tensors, replace_tensors};
use still_model::{Cache, Cancel, ModelError, OnRead};

use crate::arguments::Tokens;
use crate::errors::{exception, input};
use crate::model::Shared;
use crate::work::work;

/// The format of files.
const FORMAT: u32 = 1;
/// The tensor with a file's JSON.
const HEADER: &str = "state";

/// What a model remembers of a sequence.
#[pyclass(frozen, module = "still")]
#[derive(Debug)]
pub struct State {
    pub shared: Arc<Shared>,
    rows: RowDtype,
    slot: Arc<Mutex<Slot>>,
}

#[derive(Debug)]
struct Slot {
    cache: Cache,
    /// A call is at work on a copy.
    busy: bool,
}

/// A copy of a state's cache, for a call that may change it.
pub struct Lease {
    pub cache: Cache,
    slot: Option<Arc<Mutex<Slot>>>,
}

impl Lease {
    /// Of a cache that nobody keeps.
    pub fn unowned(cache: Cache) -> Self {
        Self { cache, slot: None }
    }

    /// Whether anybody keeps it.
    pub fn is_owned(&self) -> bool {
        self.slot.is_some()
    }

    /// Puts the copy in the state's place.
    pub fn commit(mut self) {
        if let Some(slot) = self.slot.take() {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut slot.cache, &mut self.cache);
            slot.busy = false;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(slot) = &self.slot {
            slot.lock().unwrap_or_else(PoisonError::into_inner).busy = false;
        }
    }
}

/// The JSON of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: u32,
    /// [`Shared::identity`].
    model: String,
    rows: RowDtype,
}

impl State {
    pub fn new(shared: Arc<Shared>, rows: RowDtype, cache: Cache) -> Self {
        Self { shared, rows, slot: Arc::new(Mutex::new(Slot { cache, busy: false })) }
    }

    /// A copy to work on.
    ///
    /// # Errors
    /// Another call that is at work on one.
    pub fn lease(&self, py: Python<'_>) -> PyResult<Lease> {
        self.with(|slot| {
            if slot.busy {
                return Err(input(
                    py,
                    "the state is in use by another call",
                    "wait until that call is done, or fork the state",
                ));
            }
            slot.busy = true;
            Ok(Lease { cache: slot.cache.clone(), slot: Some(self.slot.clone()) })
        })
    }

    fn with<T>(&self, look: impl FnOnce(&mut Slot) -> T) -> T {
        look(&mut self.slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_file(&self, path: &Path) -> anyhow::Result<()> {
        let model = self.shared.identity()?.to_owned();
        let header = serde_json::to_vec(&Header { format: FORMAT, model, rows: self.rows })?;
        let cache = self.with(|slot| slot.cache.clone());
        let header = Tensor::from_slice(&header, header.len(), &Device::Cpu)?;
        let mut entries = vec![Entry::of(HEADER.into(), header)];
        entries.extend(cache.save()?.into_iter().map(|(name, tensor)| Entry::of(name, tensor)));
        Ok(replace_tensors(path, entries)?)
    }

    /// A state of this model that was saved.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or is of another model.
    pub fn read_file(shared: Arc<Shared>, path: &Path) -> anyhow::Result<Self> {
        let mut tensors = read_tensors(path, true)?;
        let damaged = |what: &str| ModelError::corrupt(path, what);
        let header = tensors.remove(HEADER).filter(|header| header.dtype() == DType::U8);
        let header = header.ok_or_else(|| damaged("not a saved state"))?;
        let header: Header = serde_json::from_slice(&header.flatten_all()?.to_vec1::<u8>()?)
            .map_err(|error| damaged(&format!("its header is not a state's: {error}")))?;
        let unsupported = |what: String, hint: &str| ModelError::Unsupported {
            what,
            found_in: Some(path.into()),
            hint: hint.into(),
        };
        if header.format != FORMAT {
            let what = format!("format {} of saved states", header.format);
            return Err(unsupported(what, "read the text again with this version").into());
        }
        if header.model != shared.identity()? {
            let hint = "use the model and student that the state was saved from";
            return Err(unsupported("a state of another model".into(), hint).into());
        }
        let mut cache = shared.model.new_cache(1, header.rows)?;
        cache.restore(tensors)?;
        Ok(Self::new(shared, header.rows, cache))
    }
}

#[pymethods]
impl State {
    /// Tokens read so far.
    #[getter]
    fn position(&self) -> usize {
        self.with(|slot| slot.cache.position(0))
    }

    /// Bytes held, with the room to grow into.
    #[getter]
    fn size_bytes(&self) -> usize {
        self.with(|slot| slot.cache.size_bytes())
    }

    /// How exact rows are stored.
    #[getter]
    fn rows(&self) -> &'static str {
        self.rows.name()
    }

    /// Reads a text or token ids; gives the number of tokens.
    fn read(&self, py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut lease = self.lease(py)?;
        let (shared, cancel) = (self.shared.clone(), Cancel::default());
        let begins = lease.cache.position(0) == 0;
        let ids = Tokens::of(tokens)?.ids(&shared.model.tokenizer, begins);
        let ids = ids.map_err(|error| exception(py, &error))?;
        work(py, cancel.clone(), move || {
            let reading = OnRead::default();
            if !ids.is_empty() {
                shared.model.prefill_until(&ids, &mut lease.cache, &cancel, &reading)?;
            }
            lease.commit();
            Ok(ids.len())
        })
    }

    /// A copy that goes its own way.
    fn fork(&self) -> Self {
        let cache = self.with(|slot| slot.cache.clone());
        Self::new(self.shared.clone(), self.rows, cache)
    }

    /// Writes it to a file, in place of what was there.
    fn save(slf: &Bound<'_, Self>, path: PathBuf) -> PyResult<()> {
        let state = slf.get().fork();
        work(slf.py(), Cancel::default(), move || state.write_file(&path))
    }

    fn __repr__(&self) -> String {
        format!(
            "<still.State of {} tokens, {} bytes, rows in {}>",
            self.position(),
            self.size_bytes(),
            self.rows()
        )
    }
}
