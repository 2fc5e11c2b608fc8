//! What a layer has learned, as the kernels read it.

use candle_core::Tensor;
use still_compute::Real;
use still_compute::tensor::borrow_all;

use super::operator::Operands;
use crate::arguments::expect_cpu;
use crate::output::OP;
use crate::weights::inverse_sigmoid;
use crate::{HybridWeights, Result};

/// Contiguous, in no graph, reflections folded in.
#[derive(Debug)]
pub(crate) struct Learned {
    /// `W` of `φ_q` and `φ_k`.
    pub maps: [Tensor; 2],
    log_lambda: Option<Tensor>,
    window_factor: Option<Tensor>,
}

/// A tensor of the kernels' type, contiguous and in no graph.
pub(crate) fn prepared<T: Real>(name: &'static str, tensor: &Tensor) -> Result<Tensor> {
    expect_cpu(OP, name, tensor, T::DTYPE)?;
    Ok(tensor.detach().contiguous()?)
}

impl Learned {
    /// Of one dtype, on the CPU.
    pub fn of<T: Real>(weights: &HybridWeights) -> Result<Self> {
        let optional = |name, tensor: Option<&Tensor>| {
            tensor.map(|tensor| prepared::<T>(name, tensor)).transpose()
        };
        let (map_q, map_k) = weights.folded()?;
        Ok(Self {
            maps: [
                prepared::<T>("feature_map_q", &map_q)?,
                prepared::<T>("feature_map_k", &map_k)?,
            ],
            log_lambda: optional("log_lambda", weights.log_lambda.as_ref())?,
            window_factor: optional("window_factor", weights.window_factor.as_ref())?,
        })
    }

    /// Calls `body` with the operands of a call on `q`, `k`, `v` and the gate.
    pub fn with_operands<T: Real, R>(
        &self,
        [q, k, v]: [&[T]; 3],
        gate: Option<&[T]>,
        body: impl FnOnce(Operands<'_, T>) -> R,
    ) -> candle_core::Result<R> {
        let each = |tensor: &Option<Tensor>, f: fn(T) -> T| -> candle_core::Result<_> {
            let Some(tensor) = tensor else { return Ok(None) };
            Ok(Some(tensor.to_vec1::<T>()?.into_iter().map(f).collect::<Vec<T>>()))
        };
        let lambda = each(&self.log_lambda, |l| l.exp())?;
        let against_window = each(&self.window_factor, inverse_sigmoid)?;
        borrow_all(&self.maps.each_ref(), |maps: &[&[T]]| {
            body(Operands { q, k, v, gate, map_q: maps[0], map_k: maps[1], lambda, against_window })
        })
    }
}
