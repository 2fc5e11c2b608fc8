//! A decode step as a CUDA graph: one launch in place of one for every kernel.

use std::sync::Arc;
use std::thread::{self, ThreadId};

use candle_core::{DType, Tensor};
use still_attention::{AttentionRows, GraphStep, IDLE, StepRotation};
use still_compute::cuda::{CapturedGraph, PinnedCopy, StepMemory, overwrite};

use super::small_batch;
use crate::decoder::{Decoder, Rotation};
use crate::error::Result;
use crate::model::Model;
use crate::student::Student;

/// A captured step. It reads its tensors and writes `logits`, wherever the sequences are.
pub(crate) struct StepGraph {
    graph: CapturedGraph,
    /// What its kernels write.
    _memory: StepMemory,
    inputs: Inputs,
    /// `[B, vocab]` f32
    logits: Tensor,
    /// On the host.
    copy: PinnedCopy,
    /// Whose weights it reads.
    decoder: Arc<Decoder>,
    student: Option<Student>,
    /// [`GraphStep::generation`] of all layers when it was captured.
    generation: usize,
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

impl StepGraph {
    /// Captures a step of `batch` sequences.
    pub(super) fn capture(model: &Model, layers: &[&dyn GraphStep], batch: usize) -> Result<Self> {
        let (device, decoder) = (model.decoder.device(), &model.decoder);
        let inputs = Inputs {
            ids: Tensor::zeros(batch, DType::U32, device)?,
            // Idle: what runs before the first launch leaves the state alone.
            positions: Tensor::from_vec(vec![IDLE; batch], batch, device)?,
            rotation: decoder.step_rotation(&vec![0; batch])?,
        };
        inputs.rotation.tensors(device, DType::F32)?;
        let logits = Tensor::zeros((batch, decoder.config.vocab_size), DType::F32, device)?;

        let (device, memory) = (device.as_cuda_device()?, StepMemory::default());
        let graph =
            CapturedGraph::capture(device, || queue(model, layers, &inputs, &memory, &logits))?;
        Ok(Self {
            graph,
            _memory: memory,
            inputs,
            copy: PinnedCopy::new(device, logits.elem_count())?,
            logits,
            decoder: decoder.clone(),
            student: model.student.clone(),
            generation: generation(layers),
            thread: thread::current().id(),
        })
    }

    /// Whether it still is a step of `model` and these layers, and this thread's.
    pub(super) fn fits(&self, model: &Model, layers: &[&dyn GraphStep]) -> bool {
        let maps = |student: &Option<Student>| -> Vec<_> {
            let layers = student.iter().flat_map(|student| &student.layers);
            layers.map(|layer| layer.attention.feature_map_q.id()).collect()
        };
        Arc::ptr_eq(&self.decoder, &model.decoder)
            && maps(&self.student) == maps(&model.student)
            && self.generation == generation(layers)
            && self.thread == thread::current().id()
    }

    /// Queues the step that feeds `ids` to the first sequences, at `positions`, which are their own and which the layers have room
    /// for. The others sit the step out.
    pub fn launch(&mut self, ids: &[u32], positions: &[usize]) -> Result<()> {
        let device = self.decoder.device();
        let Inputs { ids: to_ids, positions: to_positions, rotation } = &self.inputs;
        let batch = to_ids.elem_count();
        let mut rotated = positions.to_vec();
        rotated.resize(batch, 0);
        let here = self.decoder.step_rotation(&rotated)?;
        let mut ids = ids.to_vec();
        ids.resize(batch, 0);
        let mut positions: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        positions.resize(batch, IDLE);
        let (cos, sin) = rotation.tensors(device, DType::F32)?;
        let [here_cos, here_sin] = here.values();
        overwrite(to_ids, &ids)?;
        overwrite(to_positions, &positions)?;
        overwrite(&cos, here_cos)?;
        overwrite(&sin, here_sin)?;
        Ok(self.graph.launch()?)
    }

    /// The first `rows` rows of the logits of the last launch, once it is done: `[rows, vocab]`.
    pub fn logits(&mut self, rows: usize) -> Result<&[f32]> {
        Ok(self.copy.read(&self.logits.narrow(0, 0, rows)?)?)
    }

    /// What [`logits`](Self::logits) has given last.
    pub fn last_logits(&self, rows: usize) -> Result<&[f32]> {
        Ok(self.copy.last(rows * self.decoder.config.vocab_size)?)
    }
}

fn generation(layers: &[&dyn GraphStep]) -> usize {
    layers.iter().map(|layer| layer.generation()).sum()
}

/// A step's kernels. What those of a small batch write is in `memory`; what others allocate is free again at the end.
fn queue(
    model: &Model,
    layers: &[&dyn GraphStep],
    inputs: &Inputs,
    memory: &StepMemory,
    to: &Tensor,
) -> Result<()> {
    let attend = |n: usize, rows: AttentionRows<'_>, rotation: Option<StepRotation<'_>>| {
        // SAFETY: the caller has made room for the positions that `launch` is given; until then all are idle.
        Ok(unsafe { layers[n].step(rows, &inputs.positions, rotation, memory) }?)
    };
    let x = model.decoder.embed_tokens.select(&inputs.ids)?;
    let logits = if small_batch::fits(model, x.dim(0)?) {
        let rotary = model.config().rotary_dim();
        if layers.iter().all(|layer| layer.rotates(rotary)) {
            let (cos, sin) = inputs.rotation.tensors(x.device(), DType::F32)?;
            let rotation = Some(StepRotation { cos: &cos, sin: &sin });
            small_batch::step(model, x, None, memory, |n, rows| attend(n, rows, rotation))?
        } else {
            let rotation = Some(&inputs.rotation);
            small_batch::step(model, x, rotation, memory, |n, rows| attend(n, rows, None))?
        }
    } else {
        let hidden = model.through_layers(x.unsqueeze(1)?, &inputs.rotation, |n, own| {
            attend(n, own.rows(), None)
        })?;
        model.decoder.logits(&hidden.squeeze(1)?)?
    };
    Ok(to.slice_set(&logits, 0, 0)?)
}
