//! The operator on CUDA tensors, and what its backward pass needs.

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, Tensor};

use super::backward::backward;
use super::forward::{Operands, Saved, forward};
use super::layout::{flags, rows_aligned, shape};
use super::routing::DeviceRouting;
use super::{log_scale, repeated, support};
use crate::linear_ops::{LinearGradients, LinearOps, SavedLinear};
use crate::saved_attention::{Call, FoldedGradients};
use crate::{
    AttentionError, HeadGeometry, HybridConfig, Mode, Result, Routing, Selection, SelectionHead,
};

/// What the forward pass computed from, and what it left.
#[derive(Debug)]
pub(crate) struct SavedAttention {
    /// Copies of each KV head that the kernels were given.
    copies: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Launched(Box<Launched>),
    Composed(Box<Composed>),
}

/// What the kernels read and wrote.
#[derive(Debug)]
struct Launched {
    device: CudaDevice,
    operands: Operands,
    saved: Saved,
    out: Tensor,
}

/// Linear attention alone, of the tensor library's ops.
#[derive(Debug)]
struct Composed {
    saved: SavedLinear,
    wants_rows: bool,
}

impl SavedAttention {
    /// Queues the forward pass of arguments that fit each other. Only what `trains` can go back.
    pub fn forward(
        call: &Call<'_>,
        geometry: HeadGeometry,
        wants_rows: bool,
        trains: bool,
    ) -> Result<(Tensor, Routing, Self)> {
        let Call { rows: [q, k, v], weights, config, routing, gate } = *call;
        support::check(q, [k, v], gate, weights, (geometry, config), trains)?;
        let device = q.device().as_cuda_device()?.clone();
        // The kernels route by KV head: where every query head decides, each gets K and V of its own.
        let copies = match config.selection_head {
            SelectionHead::KvHead => 1,
            SelectionHead::QueryHead => geometry.group(),
        };
        let (q, k, v) = (q.detach(), repeated(k, copies)?, repeated(v, copies)?);
        let (map_q, map_k) = weights.folded()?;
        if config.mode == Mode::LinearOnly {
            let (out, saved, routing) =
                linear_alone([&q, &k, &v], [&map_q, &map_k], config, routing)?;
            let composed = Composed { saved, wants_rows };
            return Ok((out, routing, Self { copies, kind: Kind::Composed(Box::new(composed)) }));
        }
        let log_scale = log_scale(weights, config)?;
        let shape = shape(&q, k.dim(1)?, flags(config))?;
        let rows = [rows_aligned(&q)?, rows_aligned(&k)?, rows_aligned(&v)?];
        let map = map_k.to_dtype(q.dtype())?.contiguous()?;
        let decided = decide(&device, &shape, rows.each_ref(), &map, config, routing)?;
        let routing = Routing::on_device(decided.clone());
        let maps = [&map_q, &map_k];
        let operands = Operands::new(shape, rows, maps, log_scale.as_ref(), gate, decided)?;
        let (out, saved) = forward(&device, &operands, trains, None)?;
        let launched = Launched { device, operands, saved, out: out.clone() };
        Ok((out, routing, Self { copies, kind: Kind::Launched(Box::new(launched)) }))
    }

    pub fn backward(&self, d_out: &Tensor) -> Result<FoldedGradients> {
        let mut to = match &self.kind {
            Kind::Launched(launched) => {
                let Launched { device, operands, saved, out } = &**launched;
                backward(device, operands, saved, out, d_out)?
            }
            Kind::Composed(composed) => composed.backward(d_out)?,
        };
        if let Some([_, d_k, d_v]) = &mut to.qkv {
            (*d_k, *d_v) = (summed(d_k, self.copies)?, summed(d_v, self.copies)?);
        }
        Ok(to)
    }
}

impl Composed {
    fn backward(&self, d_out: &Tensor) -> Result<FoldedGradients> {
        let LinearGradients { qkv, map_q, map_k } = self.saved.backward(d_out, self.wants_rows)?;
        Ok(FoldedGradients { qkv, gate: None, map_q, map_k, log_scale: None })
    }
}

/// The output of linear attention alone; `k` and `v` for every selection head.
fn linear_alone(
    [q, k, v]: [&Tensor; 3],
    [map_q, map_k]: [&Tensor; 2],
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<(Tensor, SavedLinear, Routing)> {
    let (map_q, map_k) = (&map_q.detach(), &map_k.detach());
    let ops = LinearOps { q, k, v, map_q, map_k, map: config.feature_map, counts: None };
    let (out, _, saved) = ops.forward(None)?;
    let (batch, heads, tokens, _) = k.dims4()?;
    let routing = match routing {
        Some(routing) => {
            routing.selection()?.check((batch, heads, tokens), config)?;
            routing.clone()
        }
        None => at_once((batch, heads, tokens), config.chunk),
    };
    Ok((out, saved, routing))
}

/// Every token in the state as it comes.
fn at_once((batch, heads, tokens): (usize, usize, usize), chunk: usize) -> Routing {
    let of_head = |_| (0..tokens).map(move |token| (token / chunk) as u32);
    let absorbed_at = (0..batch * heads).flat_map(of_head).collect();
    let selection = Selection { chunk, batch, heads, tokens, absorbed_at };
    Routing::on_host(selection, vec![0.0; batch * heads * tokens])
}

/// The routing of a call: its own, or what was given, from wherever it lies.
fn decide(
    device: &CudaDevice,
    shape: &still_kernels::Shape,
    rows: [&Tensor; 3],
    map_k: &Tensor,
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<DeviceRouting> {
    let dims = (shape.batch as usize, shape.kv_heads as usize, shape.tokens as usize);
    let Some(routing) = routing else {
        return DeviceRouting::decide(device, shape, rows, map_k, config);
    };
    if let Some(there) = routing.device().filter(|there| there.device().same_device(device)) {
        return match there.dims() == dims {
            true => Ok(there.clone()),
            false => Err(AttentionError::Config(format!(
                "the given routing is of {:?} sequences, selection heads and tokens, expected {dims:?}",
                there.dims()
            ))),
        };
    }
    let selection = routing.selection()?;
    selection.check(dims, config)?;
    let [q, k, _] = rows;
    DeviceRouting::given(device, shape, [q, k], config, &selection)
}

/// The gradient of what [`repeated`] repeats.
fn summed(rows: &Tensor, times: usize) -> Result<Tensor> {
    if times == 1 {
        return Ok(rows.clone());
    }
    let (batch, heads, tokens, head_dim) = rows.dims4()?;
    Ok(rows.reshape((batch, heads / times, times, tokens, head_dim))?.sum(2)?)
}
