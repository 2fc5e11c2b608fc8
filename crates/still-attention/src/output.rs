//! What a call of the operator gives, and the name that its errors have.

use candle_core::Tensor;

use crate::Routing;

pub(crate) const OP: &str = "hybrid_attention";

/// Output of [`hybrid_attention`](crate::hybrid_attention).
#[derive(Clone, Debug)]
pub struct HybridOutput {
    /// Attention output per query head before `o_proj`, `[B, H, N, D]`.
    pub out: Tensor,
    /// The routing that was used, on the device of `out`.
    pub routing: Routing,
}
