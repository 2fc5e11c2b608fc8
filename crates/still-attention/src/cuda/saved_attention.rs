//! The operator on CUDA tensors, and what its backward pass needs.

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, Tensor, Var};

use still_compute::pull_back;
use still_kernels::CHUNK;

use super::backward::backward;
use super::forward::{Operands, Saved, forward};
use super::layout::{rows_aligned, shape};
use super::routing::DeviceRouting;
use super::support::{self, LINEAR_ALONE};
use super::{log_scale, repeated};
use crate::linear_branch::LinearBranch;
use crate::saved_attention::{Call, FoldedGradients};
use crate::{AttentionError, HeadGeometry, HybridConfig, Result, Routing, SelectionHead};

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
    /// The linear branch alone, composed of the tensor library's ops: a graph of its own, from variables.
    Composed {
        rows: Option<[Var; 3]>,
        maps: [Var; 2],
        log_scale: Option<Var>,
        out: Tensor,
    },
}

/// What the kernels read and wrote.
#[derive(Debug)]
struct Launched {
    device: CudaDevice,
    operands: Operands,
    saved: Saved,
    out: Tensor,
}

impl SavedAttention {
    /// Queues the forward pass of arguments that fit each other. Only what `trains` can go back.
    pub fn forward(
        call: &Call<'_>,
        geometry: HeadGeometry,
        wants_rows: bool,
        trains: bool,
    ) -> Result<(Tensor, Routing, Self)> {
        let Call { rows: [q, k, v], weights, config, routing, .. } = *call;
        support::check(q, [k, v], weights, geometry, config)?;
        let device = q.device().as_cuda_device()?.clone();
        // The kernels route by KV head: where every query head decides, each gets K and V of its own.
        let copies = match config.selection_head {
            SelectionHead::KvHead => 1,
            SelectionHead::QueryHead => geometry.group(),
        };
        let (q, k, v) = (q.detach(), repeated(k, copies)?, repeated(v, copies)?);
        let (map_q, map_k) = weights.folded()?;
        let log_scale = log_scale(weights, config)?;
        let shape = shape(&q, k.dim(1)?)?;
        let rows = [rows_aligned(&q)?, rows_aligned(&k)?, rows_aligned(&v)?];
        let decided = decide(&device, &shape, [&rows[0], &rows[1]], config, routing)?;
        let routing = Routing::on_device(decided.clone());
        if config.branches != LINEAR_ALONE {
            let maps = [&map_q, &map_k];
            let operands = Operands::new(shape, rows, maps, log_scale.as_ref(), decided)?;
            let (out, saved) = forward(&device, &operands, trains, None)?;
            let launched = Launched { device, operands, saved, out: out.clone() };
            let kind = Kind::Launched(Box::new(launched));
            return Ok((out, routing, Self { copies, kind }));
        }

        let variable = |tensor: &Tensor| Var::from_tensor(tensor);
        let maps = [variable(&map_q)?, variable(&map_k)?];
        let log_scale = log_scale.as_ref().map(variable).transpose()?;
        let tracked = match wants_rows {
            true => Some([variable(&q)?, variable(&k)?, variable(&v)?]),
            false => None,
        };
        let [q, k, v] = match &tracked {
            Some(rows) => rows.each_ref().map(Var::as_tensor),
            None => [&q, &k, &v],
        };
        let branch = LinearBranch {
            q,
            k,
            v,
            map_q: &maps[0],
            map_k: &maps[1],
            log_scale: log_scale.as_deref(),
            absorbed: &decided.absorbed()?,
            chunk: CHUNK,
        };
        let out = branch.forward()?;
        let detached = out.detach();
        let kind = Kind::Composed { rows: tracked, maps, log_scale, out };
        Ok((detached, routing, Self { copies, kind }))
    }

    pub fn backward(&self, d_out: &Tensor) -> Result<FoldedGradients> {
        let mut to = match &self.kind {
            Kind::Launched(launched) => {
                let Launched { device, operands, saved, out } = &**launched;
                backward(device, operands, saved, out, d_out)?
            }
            Kind::Composed { rows, maps, log_scale, out } => {
                let grads = pull_back(out, &d_out.contiguous()?)?.backward()?;
                let of = |var: &Var| match grads.get(var) {
                    Some(gradient) => Ok(gradient.clone()),
                    None => var.zeros_like(),
                };
                let qkv = match rows {
                    Some([q, k, v]) => Some([of(q)?, of(k)?, of(v)?]),
                    None => None,
                };
                let (map_q, map_k) = (of(&maps[0])?, of(&maps[1])?);
                let log_scale = log_scale.as_ref().map(of).transpose()?;
                FoldedGradients { qkv, gate: None, map_q, map_k, log_scale }
            }
        };
        if let Some([_, d_k, d_v]) = &mut to.qkv {
            (*d_k, *d_v) = (summed(d_k, self.copies)?, summed(d_v, self.copies)?);
        }
        Ok(to)
    }
}

/// The routing of a call: its own, or what was given, from wherever it lies.
fn decide(
    device: &CudaDevice,
    shape: &still_kernels::Shape,
    query_and_key: [&Tensor; 2],
    config: &HybridConfig,
    routing: Option<&Routing>,
) -> Result<DeviceRouting> {
    let dims = (shape.batch as usize, shape.kv_heads as usize, shape.tokens as usize);
    let Some(routing) = routing else {
        return DeviceRouting::decide(device, shape, query_and_key, config);
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
    DeviceRouting::given(device, shape, query_and_key, config, &selection)
}

/// The gradient of what [`repeated`] repeats.
fn summed(rows: &Tensor, times: usize) -> Result<Tensor> {
    if times == 1 {
        return Ok(rows.clone());
    }
    let (batch, heads, tokens, head_dim) = rows.dims4()?;
    Ok(rows.reshape((batch, heads / times, times, tokens, head_dim))?.sum(2)?)
}
