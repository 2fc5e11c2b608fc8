//! How a device runs a model: the states of its layers, long reads, decode steps.
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

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use still_attention::{AttentionState, RowDtype};

use crate::cache::{Cache, Workspace};
use crate::cancel::Cancel;
use crate::error::{ModelError, Result};
use crate::model::Model;

pub use cpu::lanes;
pub(crate) use packs::Piece;

/// Takes final-normed hidden states `[n, E]` and where in the sequence they start; `Break` ends the read.
pub(crate) type EachBlock<'a> = dyn Fn(usize, Tensor) -> ControlFlow<()> + Sync + 'a;

/// How many sequences are best fed to a model on its device.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// Whether threads feed sequences of their own side by side; otherwise one thread feeds all.
    pub side_by_side: bool,
    /// New tokens to read together at most: caches exist for so many at a time.
    pub tokens: usize,
    /// Tokens that reading a common beginning once has to save to be worth it.
    pub least_shared: usize,
    /// Whether sequences are read from their first token on, and continued, as one padded batch: a layer's attention is then launched
    /// once, not once a sequence.
    pub padded: bool,
}

/// What differs between devices when a model runs. A new kind of device is one implementation.
pub(crate) trait Executor: Sync {
    /// Dtypes of weights and activations that it has kernels for, the usual one first.
    fn dtypes(&self) -> &'static [DType];

    /// How many sequences are best fed to it.
    fn batching(&self) -> Batching;

    /// The empty states of all layers.
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
        cancel: &Cancel,
        each: &EachBlock<'_>,
    ) -> Result<()>;

    /// Cuts sequences of these lengths, in order, into packs whose rows go through every product together.
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

/// [`Executor::decode_many`] where a device has no step of several caches: one is fed after another.
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
/// A device that there is none for.
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

/// The dtype of weights and activations that a device usually computes in.
///
/// # Errors
/// A device that no model runs on.
pub fn usual_dtype(device: &Device) -> Result<DType> {
    Ok(executor(device)?.dtypes()[0])
}

/// An error unless `device` has kernels for `dtype`.
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

/// Memory that an executor keeps from step to step. It holds nothing between calls that matters, so that a copy starts without.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    step: cpu::Buffers,
    /// The step as a GPU replays it.
    #[cfg(feature = "cuda")]
    graph: Option<cuda::StepGraph>,
    /// Steps of sequences that have a cache each.
    #[cfg(feature = "cuda")]
    steps: cuda::Steps,
}

impl Scratch {
    /// The logits of the last step of several caches, if a device has left them here.
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
