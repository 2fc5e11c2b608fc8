//! The operator on CPU tensors, and what its backward pass needs.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use still_compute::Real;
use still_compute::tensor::borrow_all;

use super::gradients::Wanted;
use super::learned::{Learned, prepared};
use super::operator::{Operands, Operator};
use crate::arguments::{expect_cpu, expect_shape};
use crate::output::OP;
use crate::saved_attention::{Call, FoldedGradients};
use crate::{AttentionError, HeadGeometry, HybridConfig, Result, Routing, Selection};

/// The operands as they are, and what the forward pass made of them.
#[derive(Debug)]
pub(crate) struct SavedAttention {
    operands: Tensors,
    geometry: HeadGeometry,
    config: HybridConfig,
    wants_rows: bool,
    selection: Arc<Selection>,
    out: Tensor,
}

/// Contiguous, in no graph.
#[derive(Debug)]
struct Tensors {
    qkv: [Tensor; 3],
    gate: Option<Tensor>,
    learned: Learned,
}

impl SavedAttention {
    /// Of arguments that fit each other.
    pub fn forward(
        call: &Call<'_>,
        geometry: HeadGeometry,
        wants_rows: bool,
    ) -> Result<(Tensor, Routing, Self)> {
        match call.rows[0].dtype() {
            DType::F32 => Self::forward_as::<f32>(call, geometry, wants_rows),
            #[cfg(feature = "float64")]
            DType::F64 => Self::forward_as::<f64>(call, geometry, wants_rows),
            other => Err(AttentionError::Unsupported {
                op: OP,
                tensor: "q",
                expected: match cfg!(feature = "float64") {
                    true => "f32 or f64 on the CPU",
                    false => "f32 on the CPU (f64 needs the feature float64 of still-attention)",
                },
                got: other.as_str().into(),
            }),
        }
    }

    fn forward_as<T: Real>(
        call: &Call<'_>,
        geometry: HeadGeometry,
        wants_rows: bool,
    ) -> Result<(Tensor, Routing, Self)> {
        let Call { rows: [q, ..], config, routing, .. } = *call;
        let (batch, heads, tokens, _) = q.dims4()?;
        let given = routing.map(Routing::selection).transpose()?;
        if let Some(given) = &given {
            given
                .check((batch, geometry.selection_heads(config.selection_head), tokens), config)?;
        }
        let operands = Tensors::of::<T>(call)?;
        let operator = Operator { geometry, config, batch, tokens };
        let (out, routed) =
            operands.with_values(|operands| operator.forward::<T>(&operands, given.as_deref()))?;
        let out = Tensor::from_vec(out, (batch, heads, tokens, geometry.head_dim), q.device())?;
        let routing = Routing::on_host(routed.selection, routed.scores);
        let (selection, config) = (routing.selection()?, config.clone());
        let saved = Self { operands, geometry, config, wants_rows, selection, out: out.clone() };
        Ok((out, routing, saved))
    }

    /// What [`SavedAttention::forward`] saved of a call whose routing is given, from its output.
    pub fn of_output(
        call: &Call<'_>,
        geometry: HeadGeometry,
        routing: &Routing,
        out: &Tensor,
        wants_rows: bool,
    ) -> Result<Self> {
        let Call { rows: [q, ..], config, .. } = *call;
        let (batch, _, tokens, _) = q.dims4()?;
        let selection = routing.selection()?;
        selection
            .check((batch, geometry.selection_heads(config.selection_head), tokens), config)?;
        expect_cpu(OP, "out", out, q.dtype())?;
        expect_shape(OP, "out", out, q.dims())?;
        let operands = Tensors::as_rows(call)?;
        let out = out.detach().contiguous()?;
        Ok(Self { operands, geometry, config: config.clone(), wants_rows, selection, out })
    }

    pub fn backward(&self, d_out: &Tensor) -> Result<FoldedGradients> {
        #[cfg(feature = "float64")]
        if self.out.dtype() == DType::F64 {
            return self.backward_as::<f64>(d_out);
        }
        self.backward_as::<f32>(d_out)
    }

    fn backward_as<T: Real>(&self, d_out: &Tensor) -> Result<FoldedGradients> {
        let Self { operands, geometry, config, wants_rows, selection, out } = self;
        let (batch, _, tokens, _) = out.dims4()?;
        let operator = Operator { geometry: *geometry, config, batch, tokens };
        let wanted = Wanted { qkv: *wants_rows };
        let to = borrow_all(&[out, d_out], |outs: &[&[T]]| {
            operands.with_values(|operands| {
                operator.backward(&operands, selection, (outs[0], outs[1]), wanted)
            })
        })??;
        let tensor =
            |values: Vec<T>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let [q, k, v] = &operands.qkv;
        let [d_q, d_k, d_v] = to.qkv;
        let qkv = match wants_rows {
            true => Some([tensor(d_q, q)?, tensor(d_k, k)?, tensor(d_v, v)?]),
            false => None,
        };
        let heads = to.log_scale.len();
        Ok(FoldedGradients {
            qkv,
            gate: operands.gate.as_ref().map(|gate| tensor(to.gate, gate)).transpose()?,
            map_q: tensor(to.map_q, &operands.learned.maps[0])?,
            map_k: tensor(to.map_k, &operands.learned.maps[1])?,
            log_scale: Some(Tensor::from_vec(to.log_scale, heads, out.device())?),
        })
    }
}

impl Tensors {
    /// The operands of a call, in the dtype of its rows.
    fn as_rows(call: &Call<'_>) -> Result<Self> {
        #[cfg(feature = "float64")]
        if call.rows[0].dtype() == DType::F64 {
            return Self::of::<f64>(call);
        }
        Self::of::<f32>(call)
    }

    /// The operands of a call.
    fn of<T: Real>(call: &Call<'_>) -> Result<Self> {
        let Call { rows: [q, k, v], gate, weights, .. } = *call;
        Ok(Self {
            qkv: [prepared::<T>("q", q)?, prepared::<T>("k", k)?, prepared::<T>("v", v)?],
            gate: gate.map(|gate| prepared::<T>("gate", gate)).transpose()?,
            learned: Learned::of::<T>(weights)?,
        })
    }

    fn with_values<T: Real, R>(
        &self,
        body: impl FnOnce(Operands<'_, T>) -> R,
    ) -> candle_core::Result<R> {
        let tensors: Vec<&Tensor> = self.qkv.iter().chain(&self.gate).collect();
        borrow_all(&tensors, |values| {
            let rows = [values[0], values[1], values[2]];
            self.learned.with_operands(rows, values.get(3).copied(), body)
        })?
    }
}
