//! A decode step as a CUDA graph: one launch in place of one for every kernel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::cuda::cudarc::driver::{CudaGraph, DriverError, sys};
use candle_core::{CudaDevice, DType, Error, Tensor};
use still_attention::CudaHybridState;

use super::{CudaLayer, few_step};
use crate::decoder::{Decoder, Rotation};
use crate::error::{ModelError, Result};
use crate::model::{LayerCache, Model};
use crate::student::Student;

/// A captured step of one cache. It reads its tensors and writes `logits`, wherever the sequences are.
pub(crate) struct StepGraph {
    exec: Exec,
    inputs: Inputs,
    /// `[B, vocab]` f32
    pub logits: Tensor,
    /// Whose weights it reads.
    decoder: Arc<Decoder>,
    student: Option<Student>,
    /// [`moves`] when it was captured.
    moves: usize,
    /// Which captured it. The tensor library keeps small uploads, which the graph reads, for as long as that thread lives.
    thread: ThreadId,
}

impl std::fmt::Debug for StepGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StepGraph").field("logits", &self.logits).finish_non_exhaustive()
    }
}

/// Where the host leaves what differs from step to step.
struct Inputs {
    /// `[B]` u32
    ids: Tensor,
    /// `[B]` u32
    positions: Tensor,
    /// One run a sequence.
    rotation: Rotation,
}

/// Held by whoever captures.
static CAPTURE: Mutex<()> = Mutex::new(());

/// While this is held no thread captures: opening a device does what would end a capture anywhere in the process.
pub(crate) fn no_capture() -> MutexGuard<'static, ()> {
    CAPTURE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Exec(CudaGraph);

// SAFETY: a graph must not be used by two threads at once. It is launched through `&mut` and dropped by its owner; a shared
// reference gives nothing away.
unsafe impl Send for Exec {}
unsafe impl Sync for Exec {}

/// Whether a device's stream can be captured: with event tracking, buffers would be waited for that the capture does not know.
pub(super) fn captures(device: &CudaDevice) -> bool {
    !device.cuda_stream().context().is_managing_stream_synchronization()
}

/// How often memory of the layers has moved.
fn moves(layers: &[LayerCache]) -> usize {
    let moves = |layer: &LayerCache| match layer {
        LayerCache::Cuda(CudaLayer::Hybrid(state)) => state.moves(),
        _ => 0,
    };
    layers.iter().map(moves).sum()
}

impl StepGraph {
    /// Captures a step of `batch` sequences.
    pub fn capture(model: &Model, layers: &[LayerCache], batch: usize) -> Result<Self> {
        let (device, decoder) = (model.decoder.device(), &model.decoder);
        let inputs = Inputs {
            ids: Tensor::zeros(batch, DType::U32, device)?,
            // Idle: what runs before the first launch leaves the state alone.
            positions: Tensor::from_vec(vec![CudaHybridState::IDLE; batch], batch, device)?,
            rotation: decoder.rotation_at(&vec![0; batch], 1)?,
        };
        inputs.rotation.tensors(device, DType::F32)?;
        let logits = Tensor::zeros((batch, decoder.config.vocab_size), DType::F32, device)?;

        let device = device.as_cuda_device()?;
        let stream = device.cuda_stream();
        // Shapes and strides that kernels read from the device are uploaded by a first run, on this thread, and kept; so are
        // kernels that have not been loaded yet, and the workspace of products.
        let _uploaded = device.enable_cuda_graph_htod_cache();
        queue(model, layers, &inputs, &logits)?;
        let capturing = no_capture();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(driver)?;
        let queued = queue(model, layers, &inputs, &logits);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // The stream is of no use to anyone before its capture has ended, whatever came of it.
        let graph = stream.end_capture(flags);
        drop(capturing);
        queued?;
        let graph = graph.map_err(driver)?;
        let graph = graph.ok_or_else(|| ModelError::Invalid("a captured step is empty".into()))?;
        Ok(Self {
            exec: Exec(graph),
            inputs,
            logits,
            decoder: decoder.clone(),
            student: model.student.clone(),
            moves: moves(layers),
            thread: thread::current().id(),
        })
    }

    /// Whether it still is a step of `model` and these layers, and this thread's.
    pub fn fits(&self, model: &Model, layers: &[LayerCache]) -> bool {
        let maps = |student: &Option<Student>| -> Vec<_> {
            let layers = student.iter().flat_map(|student| &student.layers);
            layers.map(|layer| layer.attention.feature_map_q.id()).collect()
        };
        Arc::ptr_eq(&self.decoder, &model.decoder)
            && maps(&self.student) == maps(&model.student)
            && self.moves == moves(layers)
            && self.thread == thread::current().id()
    }

    /// Queues the step that feeds `ids` at `positions`, which are the sequences' own and which the layers have room for.
    pub fn launch(&mut self, ids: &[u32], positions: &[usize]) -> Result<()> {
        let device = self.decoder.device();
        let Inputs { ids: to_ids, positions: to_positions, rotation } = &self.inputs;
        let turned = self.decoder.rotation_at(positions, 1)?;
        let positions: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        to_ids.slice_set(&Tensor::from_slice(ids, ids.len(), device)?, 0, 0)?;
        to_positions.slice_set(&Tensor::from_vec(positions, ids.len(), device)?, 0, 0)?;
        let angles = |of: &Rotation| of.tensors(device, DType::F32);
        let (to, from) = (angles(rotation)?, angles(&turned)?);
        to.0.slice_set(&from.0, 0, 0)?;
        to.1.slice_set(&from.1, 0, 0)?;
        self.exec.0.launch().map_err(driver)
    }
}

/// A step's kernels; what they allocate is free again at the end.
fn queue(model: &Model, layers: &[LayerCache], inputs: &Inputs, to: &Tensor) -> Result<()> {
    let attend = |n: usize, [q, k, v]: [&Tensor; 3]| match &layers[n] {
        LayerCache::Cuda(CudaLayer::Hybrid(state)) => {
            // SAFETY: the caller has made room for the positions that `launch` is given; until then all are idle.
            Ok(unsafe { state.step(q, k, v, &inputs.positions) }?)
        }
        _ => Err(ModelError::Invalid("a graph is made of hybrid layers on CUDA".into())),
    };
    let x = model.decoder.embed_tokens.select(&inputs.ids)?;
    let logits = if few_step::fits(model, x.dim(0)?) {
        few_step::step(model, x, &inputs.rotation, attend)?
    } else {
        let hidden = model.through_layers(x.unsqueeze(1)?, &inputs.rotation, |n, own, _| {
            attend(n, [&own.q, &own.k, &own.v]).map(Some)
        })?;
        let hidden =
            hidden.ok_or_else(|| ModelError::Invalid("a layer gave no attention".into()))?;
        model.decoder.logits(&hidden.squeeze(1)?)?
    };
    Ok(to.slice_set(&logits, 0, 0)?)
}

fn driver(error: DriverError) -> ModelError {
    Error::wrap(error).into()
}
