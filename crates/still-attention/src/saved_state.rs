//! A state as named tensors: what is kept of it in a file.
//!
//! Rows lie as `[rows, D]` in token order of their store, in the dtype that the state stores them in (8-bit codes as bytes, two's
//! complement; 4-bit codes two a byte, the first in its low half), so that a state comes back bit for bit and other programs can
//! read it.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::{AttentionError, Result};

/// The tensors of a state, by name; all on the host.
#[derive(Clone, Debug, Default)]
pub struct SavedState {
    tensors: BTreeMap<String, Tensor>,
}

impl SavedState {
    /// Adds a tensor, as it came out of a file.
    pub fn insert(&mut self, name: String, tensor: Tensor) {
        self.tensors.insert(name, tensor);
    }

    /// Its tensors by name.
    pub fn into_tensors(self) -> BTreeMap<String, Tensor> {
        self.tensors
    }

    pub(crate) fn put(&mut self, part: usize, name: &str, tensor: Tensor) {
        self.tensors.insert(format!("{part}.{name}"), tensor);
    }

    /// Rows of a tensor, if it is there.
    pub(crate) fn rows(&self, part: usize, name: &str) -> Option<usize> {
        self.tensors.get(&format!("{part}.{name}"))?.dims().first().copied()
    }

    /// Takes one out, of a known dtype and shape (`None`: any number of rows).
    pub(crate) fn take(
        &mut self,
        part: usize,
        name: &str,
        dtype: DType,
        shape: &[Option<usize>],
    ) -> Result<Tensor> {
        let full = format!("{part}.{name}");
        let Some(tensor) = self.tensors.remove(&full) else {
            return Err(AttentionError::Config(format!("a saved state has no tensor {full:?}")));
        };
        let fits = tensor.rank() == shape.len()
            && tensor
                .dims()
                .iter()
                .zip(shape)
                .all(|(&is, size)| size.is_none_or(|size| size == is));
        if !fits {
            let size =
                |size: &Option<usize>| size.map_or("any".to_owned(), |size| size.to_string());
            let expected = shape.iter().map(size).collect::<Vec<_>>().join(" × ");
            return Err(AttentionError::Config(format!(
                "a saved state's tensor {full:?} is {:?}, and this state's {expected}",
                tensor.dims()
            )));
        }
        if tensor.dtype() != dtype {
            return Err(AttentionError::Config(format!(
                "a saved state's tensor {full:?} is in {}, and this state's in {}",
                tensor.dtype().as_str(),
                dtype.as_str()
            )));
        }
        Ok(tensor)
    }

    /// An error if something was not taken: it belongs to another state.
    pub(crate) fn check_all_taken(self) -> Result<()> {
        match self.tensors.keys().next() {
            None => Ok(()),
            Some(name) => Err(AttentionError::Config(format!(
                "a saved state has a tensor {name:?} that this one has no place for"
            ))),
        }
    }

    /// A number that counts tokens.
    pub(crate) fn put_count(&mut self, part: usize, name: &str, count: usize) -> Result<()> {
        let tensor = Tensor::from_slice(&[count as i64], 1, &Device::Cpu)?;
        self.put(part, name, tensor);
        Ok(())
    }

    /// The number of [`put_count`](Self::put_count).
    pub(crate) fn take_count(&mut self, part: usize, name: &str) -> Result<usize> {
        let tensor = self.take(part, name, DType::I64, &[Some(1)])?;
        let count = tensor.to_vec1::<i64>()?[0];
        usize::try_from(count).map_err(|_| {
            AttentionError::Config(format!("a saved state has {count} as its {part}.{name}"))
        })
    }
}
