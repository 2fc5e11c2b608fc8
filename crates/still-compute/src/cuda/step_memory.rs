//! Memory that the kernels of a step share.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};

/// What the kernels of a step of all layers write, by name: a layer's values lie where those of the layer before did.
///
/// A captured step allocates nothing then. Where a graph allocates or frees between two kernels, the second does not begin before
/// the first has ended, which our kernels of a step otherwise do (`early.cuh` of `still-kernels`).
#[derive(Debug, Default)]
pub struct StepMemory {
    tensors: Mutex<Vec<(StepTensor, Tensor)>>,
}

/// A name in a [`StepMemory`]: what the values are and, where there are several of a kind, which.
pub type StepTensor = (&'static str, usize);

impl StepMemory {
    /// The tensor of a name and shape: the same in every call, not initialised in the first. Its values are those of the layer that
    /// asked last.
    ///
    /// # Errors
    /// No memory left on the device.
    pub fn tensor(
        &self,
        name: StepTensor,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        let mut tensors = self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        let there = tensors.iter().find(|(other, tensor)| {
            *other == name && *tensor.shape() == shape && tensor.dtype() == dtype
        });
        if let Some((_, tensor)) = there {
            return Ok(tensor.clone());
        }
        // SAFETY: who asks for it queues the kernel that fills it.
        let tensor = unsafe { Tensor::empty(shape, dtype, device)? };
        tensors.push((name, tensor.clone()));
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_tensor_of_a_shape() {
        let (memory, device) = (StepMemory::default(), Device::Cpu);
        let of = |name, shape| memory.tensor(name, shape, DType::F32, &device).unwrap();
        let first = of(("rows", 0), (2, 3));
        assert_eq!(first.id(), of(("rows", 0), (2, 3)).id());
        for other in [of(("rows", 1), (2, 3)), of(("rows", 0), (3, 2)), of(("sums", 0), (2, 3))] {
            assert_ne!(first.id(), other.id());
        }
    }
}
