//! How a device runs a model: states of layers, prefill, decode steps.
//!
//! | file | what |
//! |---|---|
//! | `cpu/read.rs` | a long sequence in blocks, on lanes of threads |
//! | `cpu/step.rs` | a decode step, by all threads together |
//! | `cpu/updates.rs` | low-rank updates as such a step reads them |
//! | `cuda/small_batch.rs`, `cuda/small_batch_products.rs` | a layer for a few tokens in few kernels |
//! | `cuda/step_graph.rs`, `cuda/steps.rs` | a decode step as a CUDA graph: of one cache, of a cache for each sequence |
//! | `packs.rs` | how sequences that are read together are cut |

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod packs;

use std::ops::{ControlFlow, Range};

use candle_core::{DType, Device, Tensor};
use still_attention::{AttentionState, RowDtype};

use crate::cache::{Cache, Workspace};
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::model::Model;

pub use cpu::lanes;
pub(crate) use packs::Piece;

/// Whose hidden states a prefill is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    All,
    /// The last token's. Of the others the last layer's output may be left out: nothing reads it.
    Last,
}

/// Receives which tokens have been read, and their final-normed hidden states `[n, E]` unless they were left out. `Break` ends the
/// prefill.
pub(crate) type EachBlock<'a> = dyn Fn(Range<usize>, Option<Tensor>) -> ControlFlow<()> + Sync + 'a;

/// How to batch sequences on a device.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// Whether each thread feeds sequences of its own. Otherwise one thread feeds all.
    pub side_by_side: bool,
    /// Most new tokens to read together. It limits the number of caches that exist at a time.
    pub tokens: usize,
    /// A common prefix is read once if this saves at least so many tokens.
    pub least_shared: usize,
    /// Whether to read and continue sequences as one padded batch, which launches a layer's attention once instead of once a
    /// sequence.
    pub padded: bool,
}

/// What differs between devices when a model runs. A new kind of device is one implementation.
pub(crate) trait Executor: Sync {
    /// Dtypes of weights and activations that it has kernels for, the default first.
    fn dtypes(&self) -> &'static [DType];

    /// How to batch sequences.
    fn batching(&self) -> Batching;

    /// Empty states of all layers.
    ///
    /// # Errors
    /// As [`Model::new_cache`].
    fn new_states(
        &self,
        model: &Model,
        batch: usize,
        rows: RowDtype,
    ) -> Result<Vec<Box<dyn AttentionState>>>;

    /// [`Model::forward`] of a checked cache.
    ///
    /// # Errors
    /// As there.
    fn forward(
        &self,
        model: &Model,
        ids: &Tensor,
        cache: &mut Cache,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        model.forward_through_layers(ids, cache, lengths)
    }

    /// [`Model::read_until`] of a checked cache.
    ///
    /// # Errors
    /// As there.
    fn read(
        &self,
        model: &Model,
        ids: &[u32],
        cache: &mut Cache,
        how: (Wanted, &Cancel),
        each: &EachBlock<'_>,
    ) -> Result<()>;

    /// Cuts sequences of these lengths, in order, into packs. All rows of a pack share every matrix product.
    fn packs(&self, lengths: &[usize]) -> Vec<Vec<Piece>>;

    /// [`Model::decode`] of a checked cache.
    ///
    /// # Errors
    /// As there.
    fn decode<'a>(&self, model: &Model, ids: &[u32], cache: &'a mut Cache) -> Result<&'a [f32]>;

    /// [`Model::decode_many`] of checked caches.
    ///
    /// # Errors
    /// As there.
    fn decode_many<'a>(
        &self,
        model: &Model,
        ids: &[u32],
        caches: &mut [&mut Cache],
        workspace: &'a mut Workspace,
    ) -> Result<&'a [f32]>;
}

/// [`Executor::decode_many`] on a device without such a step: feeds one cache after another.
#[cfg(feature = "cuda")]
fn one_by_one<'a>(
    executor: &dyn Executor,
    model: &Model,
    ids: &[u32],
    caches: &mut [&mut Cache],
    workspace: &'a mut Workspace,
) -> Result<&'a [f32]> {
    workspace.scratch = Scratch::default();
    workspace.logits.clear();
    for (id, cache) in ids.iter().zip(caches) {
        let logits = executor.decode(model, &[*id], cache)?;
        workspace.logits.extend_from_slice(logits);
    }
    Ok(&workspace.logits)
}

/// The executor of a device.
///
/// # Errors
/// A device without an executor.
pub(crate) fn executor(device: &Device) -> Result<&'static dyn Executor> {
    match device {
        Device::Cpu => Ok(&cpu::Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Ok(&cuda::Cuda),
        other => Err(ModelError::Unsupported {
            what: format!("a model on {:?}", other.location()),
            found_in: None,
            hint: "use cpu, or cuda with a program that was built with `--features cuda`".into(),
        }),
    }
}

/// The default dtype of weights and activations on a device.
///
/// # Errors
/// A device without an executor.
pub fn usual_dtype(device: &Device) -> Result<DType> {
    Ok(executor(device)?.dtypes()[0])
}

/// Checks that `device` has kernels for `dtype`.
pub(crate) fn check_dtype(device: &Device, dtype: DType) -> Result<()> {
    if executor(device)?.dtypes().contains(&dtype) {
        return Ok(());
    }
    Err(ModelError::Unsupported {
        what: format!("a model in {} on {:?}", dtype.as_str(), device.location()),
        found_in: None,
        hint: "use f32; bf16 is for CUDA devices".into(),
    })
}

/// Memory that an executor reuses from step to step. Its content does not matter between calls, so a copy starts empty.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    step: cpu::Buffers,
    /// The captured graph of a step.
    #[cfg(feature = "cuda")]
    graph: Option<cuda::StepGraph>,
    /// Captured graphs of steps over several caches.
    #[cfg(feature = "cuda")]
    steps: cuda::Steps,
}

impl Scratch {
    /// Logits of the last step over several caches, if the device has left them here.
    pub(crate) fn logits(&self) -> Result<Option<&[f32]>> {
        #[cfg(feature = "cuda")]
        return self.steps.logits();
        #[cfg(not(feature = "cuda"))]
        Ok(None)
    }
}

impl Clone for Scratch {
    fn clone(&self) -> Self {
        Self::default()
    }
}
