//! Hybrid attention over whole sequences, in the tensor library's graph where something in it has one.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Error, Layout, Shape, Storage, Tensor, bail,
};

use crate::output::{HybridOutput, OP};
use crate::saved_attention::{AttentionGradients, Call, SavedAttention};
use crate::{HybridConfig, HybridWeights, Result, Routing};

/// Hybrid attention of whole sequences that start at position 0.
///
/// * `q` `[B, H, N, D]`, `k` and `v` `[B, K, N, D]`: after RoPE, all of one dtype on one device.
/// * `gate` `[B, H, N, D]`: `γ = sigmoid(W_g x)`, with `config.gate`.
/// * `weights`: on the same device.
/// * `routing`: routing to use instead of the router's own (parity tests, recomputation).
///
/// On the CPU f32 and f64, everything that a configuration can say. On CUDA (feature `cuda`) f32 and bf16, with the limits of
/// docs/cuda.md: chunks of 64, head dimensions 64, 80, 96, 128 and, in bf16 without
/// gradients, 256, and as many features, for instance; nothing waits for the device.
///
/// Gradients flow to `q`, `k`, `v`, `gate` and every tensor of `weights`; routing is discrete and has none. Without a graph:
/// [`attention_forward`](crate::attention_forward).
///
/// # Errors
/// Shapes that contradict each other or the configuration; a dtype, device or configuration without a kernel.
pub fn hybrid_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &HybridWeights,
    gate: Option<&Tensor>,
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<HybridOutput> {
    let rows: Vec<&Tensor> = [q, k, v].into_iter().chain(gate).collect();
    let learned: Vec<&Tensor> = weights.tensors().collect();
    let wants_rows = rows[..3].iter().any(|tensor| tensor.track_op());
    let trains = rows.iter().chain(&learned).any(|tensor| tensor.track_op());
    let call = Call { rows: [q, k, v], gate, weights, config, routing };
    let (output, saved) = call.forward(wants_rows, trains)?;
    if !trains {
        return Ok(output);
    }
    let op = InGraph { out: output.out, saved };
    Ok(HybridOutput { out: joined(rows)?.apply_op2(&joined(learned)?, op)?, ..output })
}

/// Values of all tensors, one after the other. The graph's ops take three tensors at most, the operator has up to ten.
fn joined<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> candle_core::Result<Tensor> {
    let flat = tensors.into_iter().map(Tensor::flatten_all);
    Tensor::cat(&flat.collect::<candle_core::Result<Vec<_>>>()?, 0)
}

/// `([q | k | v | γ], learned) → [B, H, N, D]`: a place in the graph for what was computed outside it.
struct InGraph {
    out: Tensor,
    saved: SavedAttention,
}

impl InGraph {
    fn storage(&self) -> candle_core::Result<(Storage, Shape)> {
        let out = self.out.contiguous()?;
        let (storage, layout) = out.storage_and_layout();
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }
}

impl CustomOp2 for InGraph {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.storage()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("{OP}: the output is not where its operands are"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.storage()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("{OP}: the output is not where its operands are"),
        }
    }

    fn bwd(
        &self,
        rows: &Tensor,
        learned: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (AttentionGradients { qkv, gate }, weights) =
            self.saved.gradients(d_out).map_err(Error::wrap)?;
        let d_rows = match (qkv, gate) {
            (Some(qkv), gate) => Some(joined(qkv.iter().chain(&gate))?),
            // The gate alone has a graph: it comes last.
            (None, Some(gate)) => {
                let values = rows.elem_count() - gate.elem_count();
                let zeros = Tensor::zeros(values, gate.dtype(), gate.device())?;
                Some(joined([&zeros, &gate])?)
            }
            (None, None) => None,
        };
        let d_learned = learned.track_op().then(|| joined(weights.tensors())).transpose()?;
        Ok((d_rows.filter(|_| rows.track_op()), d_learned))
    }
}
