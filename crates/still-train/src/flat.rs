//! Parameters one after the other in one vector: an optimizer's step is then a few large ops, not many small ones for each.

use std::ops::Range;

use candle_core::{DType, Device, Result, Shape, Tensor};

use crate::optimizer::Parameters;

/// Values whose squares the device adds up to one; their sum is the host's, in float64.
const PART: usize = 4096;

/// Where each parameter's values are.
#[derive(Clone, Debug)]
pub(crate) struct Flat {
    /// Of each parameter, and where the last one ends.
    starts: Vec<usize>,
}

/// Consecutive parameters that have gradients.
#[derive(Debug)]
pub(crate) struct Run {
    pub parameters: Range<usize>,
    /// Their gradients, `[values]` f32.
    pub gradient: Tensor,
}

impl Flat {
    pub fn new(parameters: &Parameters) -> Self {
        let mut starts = vec![0];
        for (n, (_, var)) in parameters.iter().enumerate() {
            starts.push(starts[n] + var.elem_count());
        }
        Self { starts }
    }

    /// Zeros for all values, where the parameters are.
    pub fn zeros(&self, parameters: &Parameters) -> Result<Tensor> {
        let device = parameters.first().map_or(&Device::Cpu, |(_, var)| var.device());
        Tensor::zeros(self.range(&(0..parameters.len())).len(), DType::F32, device)
    }

    /// Where the values of some parameters are.
    pub fn range(&self, parameters: &Range<usize>) -> Range<usize> {
        self.starts[parameters.start]..self.starts[parameters.end]
    }

    /// The part of `all` that is one parameter's, in its shape.
    pub fn of(&self, parameter: usize, all: &Tensor, shape: &Shape) -> Result<Tensor> {
        let range = self.range(&(parameter..parameter + 1));
        all.narrow(0, range.start, range.len())?.reshape(shape)
    }

    /// The gradients there are; those that follow one another together.
    pub fn runs(&self, gradients: &[Option<Tensor>]) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        let mut start = 0;
        for part in gradients.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let parameters = start..start + part.len();
            start = parameters.end;
            let there: Vec<&Tensor> = part.iter().flatten().collect();
            if !there.is_empty() {
                runs.push(Run { parameters, gradient: joined(&there)? });
            }
        }
        Ok(runs)
    }
}

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
