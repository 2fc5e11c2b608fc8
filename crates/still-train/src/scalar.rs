//! One number on the device that computed it.

use candle_core::{Result, Tensor};

/// One number: float64 on the CPU, or an f32 that stays on its device until it is read, so that nothing waits for it.
#[derive(Clone, Debug)]
pub enum Scalar {
    /// On the CPU.
    Host(f64),
    /// On a device: f32, no axes.
    Device(Tensor),
}

impl Scalar {
    /// The number; waits for the device that computes it.
    ///
    /// # Errors
    /// An error of the device.
    pub fn value(&self) -> Result<f64> {
        match self {
            Self::Host(value) => Ok(*value),
            Self::Device(value) => Ok(f64::from(value.to_scalar::<f32>()?)),
        }
    }
}

/// The numbers, in order. Those on a device come in one copy.
pub(crate) fn read(scalars: &[Scalar]) -> Result<Vec<f64>> {
    let there = scalars.iter().filter_map(|scalar| match scalar {
        Scalar::Host(_) => None,
        Scalar::Device(value) => Some(value),
    });
    let there: Vec<&Tensor> = there.collect();
    let copied = match there[..] {
        [] => Vec::new(),
        _ => Tensor::stack(&there, 0)?.to_vec1::<f32>()?,
    };
    let mut copied = copied.into_iter().map(f64::from);
    let value = |scalar: &Scalar| match scalar {
        Scalar::Host(value) => Some(*value),
        Scalar::Device(_) => copied.next(),
    };
    Ok(scalars.iter().filter_map(value).collect())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn numbers_come_back_in_order_from_wherever_they_are() {
        let there = |value: f32| Scalar::Device(Tensor::new(value, &Device::Cpu).unwrap());
        let all = [there(1.5), Scalar::Host(0.1), there(-2.0), Scalar::Host(f64::INFINITY)];
        assert_eq!(read(&all).unwrap(), [1.5, 0.1, -2.0, f64::INFINITY]);
        assert_eq!(all[2].value().unwrap(), -2.0);
        assert!(read(&[]).unwrap().is_empty());
    }
}
