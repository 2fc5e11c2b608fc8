//! Values in one vector: an optimizer's step is then a few large ops, not many small ones for each parameter.

use candle_core::{DType, Device, Result, Tensor};

/// Values whose squares the device adds up to one; their sum is the host's, in float64.
const PART: usize = 4096;

/// The values of all tensors, one after the other, apart from their graphs.
pub(crate) fn joined(tensors: &[&Tensor]) -> Result<Tensor> {
    if tensors.is_empty() {
        return Tensor::zeros(0, DType::F32, &Device::Cpu);
    }
    let flat = tensors.iter().map(|tensor| tensor.detach().flatten_all());
    Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)
}

/// The sum of the squares of a vector, f32, in as many sums as it has parts, and so in one copy to the host.
pub(crate) fn sums_of_squares(vector: &Tensor) -> Result<Tensor> {
    let len = vector.elem_count();
    let whole = len - len % PART;
    let mut sums = Vec::new();
    if whole > 0 {
        let parts = vector.narrow(0, 0, whole)?.reshape((whole / PART, PART))?;
        sums.push(parts.sqr()?.sum(1)?);
    }
    if whole < len {
        sums.push(vector.narrow(0, whole, len - whole)?.sqr()?.sum_keepdim(0)?);
    }
    Tensor::cat(&sums, 0)
}
