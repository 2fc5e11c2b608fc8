//! The operator forward and backward, without a graph.

use candle_core::{Device, Tensor};
use still_compute::Gradients;

use crate::arguments::{expect_dims, expect_shape, whole_sequences_of};
use crate::error::{AttentionError, Result};
use crate::output::{HybridOutput, OP};
use crate::{HeadGeometry, HybridConfig, HybridWeights, Routing, cpu};

/// Result of [`SavedAttention::backward`]: gradients of activations, in their dtype.
#[derive(Clone, Debug)]
pub struct AttentionGradients {
    /// Of `q` `[B, H, N, D]`, `k` and `v` `[B, K, N, D]`. `None` if the forward pass had `wants_rows = false`.
    pub qkv: Option<[Tensor; 3]>,
    /// Of the output gate, `[B, H, N, D]`.
    pub gate: Option<Tensor>,
}

/// The arguments of one call.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub rows: [&'a Tensor; 3],
    pub gate: Option<&'a Tensor>,
    pub weights: &'a HybridWeights,
    pub config: &'a HybridConfig,
    pub routing: Option<&'a Routing>,
}

/// Gradients as kernels compute them: of the maps that kernels see, and per query head of `ln(scale of the linear branch)`.
pub(crate) struct FoldedGradients {
    pub qkv: Option<[Tensor; 3]>,
    pub gate: Option<Tensor>,
    pub map_q: Tensor,
    pub map_k: Tensor,
    /// None where the scale is not learned, or not computed.
    pub log_scale: Option<Tensor>,
}

/// What one [`attention_forward`] saved for its backward pass.
#[derive(Debug)]
pub struct SavedAttention {
    weights: HybridWeights,
    out: Vec<usize>,
    kernels: Kernels,
}

#[derive(Debug)]
enum Kernels {
    Cpu(Box<cpu::SavedAttention>),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::SavedAttention>),
}

/// [`hybrid_attention`](crate::hybrid_attention) without a graph. The second result computes gradients; those of `q`, `k` and `v`
/// only with `wants_rows`.
///
/// # Errors
/// As [`hybrid_attention`](crate::hybrid_attention).
pub fn attention_forward(
    rows: [&Tensor; 3],
    gate: Option<&Tensor>,
    weights: &HybridWeights,
    config: &HybridConfig,
    routing: Option<&Routing>,
    wants_rows: bool,
) -> Result<(HybridOutput, SavedAttention)> {
    Call { rows, gate, weights, config, routing }.forward(wants_rows, true)
}

impl Call<'_> {
    /// The output, and what the backward pass needs if the call `trains`.
    #[cfg_attr(
        not(feature = "cuda"),
        allow(unused_variables, reason = "the CPU saves nothing more")
    )]
    pub fn forward(
        &self,
        wants_rows: bool,
        trains: bool,
    ) -> Result<(HybridOutput, SavedAttention)> {
        let geometry = self.check()?;
        let (out, routing, kernels) = match self.rows[0].device() {
            Device::Cpu => {
                let (out, routing, saved) =
                    cpu::SavedAttention::forward(self, geometry, wants_rows)?;
                (out, routing, Kernels::Cpu(Box::new(saved)))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let (out, routing, saved) =
                    crate::cuda::SavedAttention::forward(self, geometry, wants_rows, trains)?;
                (out, routing, Kernels::Cuda(Box::new(saved)))
            }
            device => {
                return Err(AttentionError::Unsupported {
                    op: OP,
                    tensor: "q",
                    expected: "a tensor on the CPU, or on CUDA in a build with the feature `cuda`",
                    got: format!("on {:?}", device.location()),
                });
            }
        };
        let saved =
            SavedAttention { weights: self.weights.clone(), out: out.dims().to_vec(), kernels };
        Ok((HybridOutput { out, routing }, saved))
    }

    /// Checks that shapes fit each other and the configuration.
    pub fn check(&self) -> Result<HeadGeometry> {
        let Self { rows, gate, weights, config, .. } = *self;
        check(rows.map(Tensor::dims), gate.map(Tensor::dims), weights, config)
    }
}

/// Checks that the shapes of `q`, `k`, `v` and the gate fit each other, the weights and the configuration.
pub(crate) fn check(
    rows: [&[usize]; 3],
    gate: Option<&[usize]>,
    weights: &HybridWeights,
    config: &HybridConfig,
) -> Result<HeadGeometry> {
    let (_, _, geometry) = whole_sequences_of(OP, rows)?;
    config.validate(geometry)?;
    weights.check(geometry, config)?;
    if config.gate != gate.is_some() {
        return Err(AttentionError::Config(format!(
            "the output gate is {}, its value was {}",
            if config.gate { "on" } else { "off" },
            if gate.is_some() { "given" } else { "not given" },
        )));
    }
    if let Some(gate) = gate {
        expect_dims(OP, "gate", gate, rows[0])?;
    }
    Ok(geometry)
}

impl SavedAttention {
    /// What [`attention_forward`] saved, of a call that is known by its operands, its output `[B, H, N, D]` and its routing: for
    /// graphs of other libraries, which keep tensors and nothing else. A GPU computes the output again.
    ///
    /// # Errors
    /// As [`attention_forward`]; an output or routing of another shape.
    pub fn of_output(
        rows: [&Tensor; 3],
        gate: Option<&Tensor>,
        weights: &HybridWeights,
        config: &HybridConfig,
        (out, routing): (&Tensor, &Routing),
        wants_rows: bool,
    ) -> Result<Self> {
        let call = Call { rows, gate, weights, config, routing: Some(routing) };
        if !rows[0].device().is_cpu() {
            return Ok(call.forward(wants_rows, true)?.1);
        }
        let geometry = call.check()?;
        let saved = cpu::SavedAttention::of_output(&call, geometry, routing, out, wants_rows)?;
        let (weights, out) = (weights.clone(), out.dims().to_vec());
        Ok(Self { weights, out, kernels: Kernels::Cpu(Box::new(saved)) })
    }

    /// Computes the gradients of the inputs from that of the output, `[B, H, N, D]`. Adds the gradients of the weights to
    /// `learned`.
    ///
    /// # Errors
    /// A gradient of another shape; an error of the tensor library.
    pub fn backward(&self, d_out: &Tensor, learned: &mut Gradients) -> Result<AttentionGradients> {
        let (rows, of_weights) = self.gradients(d_out)?;
        for (tensor, gradient) in self.weights.tensors().zip(of_weights.tensors()) {
            learned.add(tensor, gradient)?;
        }
        Ok(rows)
    }

    /// [`SavedAttention::backward`], which returns the gradients of the weights as `HybridWeights`.
    ///
    /// # Errors
    /// As there.
    pub fn gradients(&self, d_out: &Tensor) -> Result<(AttentionGradients, HybridWeights)> {
        expect_shape(OP, "d_out", d_out, &self.out)?;
        let FoldedGradients { qkv, gate, map_q, map_k, log_scale } = match &self.kernels {
            Kernels::Cpu(saved) => saved.backward(d_out)?,
            #[cfg(feature = "cuda")]
            Kernels::Cuda(saved) => saved.backward(d_out)?,
        };
        let of_weights = self.weights.gradients(map_q, map_k, log_scale.as_ref())?;
        Ok((AttentionGradients { qkv, gate }, of_weights))
    }
}
