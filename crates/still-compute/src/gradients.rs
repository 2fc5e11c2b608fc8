//! Gradients of learned tensors in one vector. Backward passes add to it, and the optimizer's step reads it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, TensorId, bail};

use crate::matmul::par_matmul_scaled;
use crate::tensor::{borrow, with_matrix};

/// The span of each learned tensor in one vector of all values.
#[derive(Debug)]
pub struct Spans {
    index: HashMap<TensorId, usize>,
    shapes: Vec<Shape>,
    /// Of each tensor, and where the last one ends.
    starts: Vec<usize>,
    device: Device,
}

impl Spans {
    /// Spans of tensors on one device, in this order. A tensor and its clones are the same, because they have one id.
    pub fn new<'a>(learned: impl IntoIterator<Item = &'a Tensor>) -> Self {
        let mut spans = Self {
            index: HashMap::new(),
            shapes: Vec::new(),
            starts: vec![0],
            device: Device::Cpu,
        };
        let mut end = 0;
        for (n, tensor) in learned.into_iter().enumerate() {
            end += tensor.elem_count();
            spans.index.insert(tensor.id(), n);
            spans.shapes.push(tensor.shape().clone());
            spans.starts.push(end);
            spans.device = tensor.device().clone();
        }
        spans
    }

    /// A vector of zeros for all values, f32, on the tensors' device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn zeros(&self) -> Result<Tensor> {
        Tensor::zeros(self.range(&(0..self.shapes.len())).len(), DType::F32, &self.device)
    }

    /// The span of consecutive tensors.
    pub fn range(&self, tensors: &Range<usize>) -> Range<usize> {
        self.starts[tensors.start]..self.starts[tensors.end]
    }

    /// One tensor's part of `all`, in its shape.
    ///
    /// # Errors
    /// A vector of another length.
    pub fn of(&self, tensor: usize, all: &Tensor) -> Result<Tensor> {
        let range = self.range(&(tensor..tensor + 1));
        all.narrow(0, range.start, range.len())?.reshape(&self.shapes[tensor])
    }
}

/// The gradients of one step. A tensor without a span is frozen: additions to its gradient are dropped.
#[derive(Debug)]
pub struct Gradients {
    spans: Arc<Spans>,
    sums: Sums,
    /// Which tensors have a gradient.
    written: Vec<bool>,
}

/// `[values]`, f32.
#[derive(Debug)]
enum Sums {
    Host(Vec<f32>),
    Device(Tensor),
}

/// Consecutive tensors that have gradients.
#[derive(Debug)]
pub struct Run {
    /// The tensors.
    pub tensors: Range<usize>,
    /// Their gradients, `[values]` f32.
    pub gradient: Tensor,
}

impl Gradients {
    /// No gradients yet.
    ///
    /// # Errors
    /// An error of the device.
    pub fn new(spans: &Arc<Spans>) -> Result<Self> {
        let sums = match spans.device {
            Device::Cpu => Sums::Host(vec![0.0; spans.range(&(0..spans.shapes.len())).len()]),
            _ => Sums::Device(spans.zeros()?),
        };
        Ok(Self { spans: spans.clone(), sums, written: vec![false; spans.shapes.len()] })
    }

    /// Whether `tensor` is learned.
    pub fn wants(&self, tensor: &Tensor) -> bool {
        self.spans.index.contains_key(&tensor.id())
    }

    /// Adds the gradient of a tensor, of its shape.
    ///
    /// # Errors
    /// A gradient of another shape.
    pub fn add(&mut self, tensor: &Tensor, gradient: &Tensor) -> Result<()> {
        let Some(place) = self.place(tensor, gradient.dims())? else { return Ok(()) };
        let gradient = gradient.to_dtype(DType::F32)?;
        match &mut self.sums {
            Sums::Host(sums) => borrow(&gradient, |gradient: &[f32]| {
                let sums = &mut sums[place.range];
                match place.first {
                    true => sums.copy_from_slice(gradient),
                    false => sums.iter_mut().zip(gradient).for_each(|(sum, x)| *sum += x),
                }
            }),
            Sums::Device(sums) => {
                let Range { start, end } = place.range;
                let gradient = gradient.detach().flatten_all()?.contiguous()?;
                let sum = match place.first {
                    true => gradient,
                    false => (sums.narrow(0, start, end - start)? + gradient)?,
                };
                sums.slice_set(&sum, 0, start)
            }
        }
    }

    /// Adds `scale · x y`, the gradient of a matrix `[m, n]`. `x` `[m, k]` and `y` `[k, n]` are matrices of one dtype or
    /// transposed views. The product accumulates into the vector directly.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn add_product(
        &mut self,
        tensor: &Tensor,
        scale: f64,
        x: &Tensor,
        y: &Tensor,
    ) -> Result<()> {
        let ((m, k), (inner, n)) = (x.dims2()?, y.dims2()?);
        if k != inner {
            bail!("a gradient as a product of {:?} and {:?}", x.dims(), y.dims())
        }
        if x.device().is_cpu() && (x.dtype(), y.dtype()) != (DType::F32, DType::F32) {
            if !self.wants(tensor) {
                return Ok(());
            }
            let product = x.contiguous()?.matmul(&y.contiguous()?)?.to_dtype(DType::F32)?;
            return self.add(tensor, &(product * scale)?);
        }
        let Some(place) = self.place(tensor, &[m, n])? else { return Ok(()) };
        match &mut self.sums {
            Sums::Host(sums) => with_matrix(x, |x| {
                with_matrix(y, |y| {
                    let to = &mut sums[place.range];
                    par_matmul_scaled((m, n, k), to, n, !place.first, scale as f32, x, y);
                })
            })?,
            #[cfg(feature = "cuda")]
            Sums::Device(sums) => {
                let onto = sums.narrow(0, place.range.start, m * n)?.reshape((m, n))?;
                let options =
                    crate::cuda::Gemm { alpha: scale, accumulate: Some(onto), dtype: DType::F32 };
                crate::cuda::gemm(x, y, options).map(drop)
            }
            #[cfg(not(feature = "cuda"))]
            Sums::Device(_) => bail!("gradients on {:?}: no kernel", x.device().location()),
        }
    }

    /// The gradient of a tensor, in its shape, if it has one.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn get(&self, tensor: &Tensor) -> Result<Option<Tensor>> {
        let Some(&n) = self.spans.index.get(&tensor.id()).filter(|&&n| self.written[n]) else {
            return Ok(None);
        };
        Ok(Some(match &self.sums {
            Sums::Host(sums) => {
                let values = &sums[self.spans.range(&(n..n + 1))];
                Tensor::from_slice(values, &self.spans.shapes[n], &Device::Cpu)?
            }
            Sums::Device(sums) => self.spans.of(n, sums)?.copy()?,
        }))
    }

    /// All gradients. Those of consecutive tensors come as one run.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn into_runs(self) -> Result<Vec<Run>> {
        let all = match self.sums {
            Sums::Host(sums) => {
                let count = sums.len();
                Tensor::from_vec(sums, count, &Device::Cpu)?
            }
            Sums::Device(sums) => sums,
        };
        let (mut runs, mut start) = (Vec::new(), 0);
        for part in self.written.chunk_by(|a, b| a == b) {
            let tensors = start..start + part.len();
            start = tensors.end;
            if part[0] {
                let range = self.spans.range(&tensors);
                runs.push(Run { tensors, gradient: all.narrow(0, range.start, range.len())? });
            }
        }
        Ok(runs)
    }

    /// The place of a tensor's gradient in the vector; `None` if the tensor is frozen.
    fn place(&mut self, tensor: &Tensor, dims: &[usize]) -> Result<Option<Place>> {
        let Some(&n) = self.spans.index.get(&tensor.id()) else { return Ok(None) };
        if self.spans.shapes[n].dims() != dims {
            bail!("a gradient {dims:?} of a tensor {:?}", self.spans.shapes[n].dims())
        }
        let first = !std::mem::replace(&mut self.written[n], true);
        Ok(Some(Place { range: self.spans.range(&(n..n + 1)), first }))
    }
}

struct Place {
    range: Range<usize>,
    /// Whether the span has no gradient yet.
    first: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gradients_add_up_where_their_tensors_are() {
        let learned = [[2, 2].as_slice(), &[3], &[1, 2], &[2]]
            .map(|shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
        let [a, b, c, d] = &learned;
        let spans = Arc::new(Spans::new(&learned));
        let mut gradients = Gradients::new(&spans).unwrap();
        let frozen = tensor(&[1.0], &[1]);
        assert!(gradients.wants(&a.clone()) && !gradients.wants(&frozen));
        gradients.add(&frozen, &frozen).unwrap();

        let (x, y) =
            (tensor(&[1.0, 2.0, 3.0, 4.0], &[2, 2]), tensor(&[1.0, 0.0, 1.0, 1.0], &[2, 2]));
        gradients.add_product(a, 2.0, &x.t().unwrap(), &y).unwrap();
        assert_eq!(values(&gradients.get(a).unwrap().unwrap()), [8.0, 6.0, 12.0, 8.0]);
        let wide = [&x, &y].map(|x| x.to_dtype(DType::F64).unwrap());
        gradients.add_product(a, 1.0, &wide[0], &wide[1]).unwrap();
        gradients.add(a, &y).unwrap();
        gradients.add_product(a, 0.5, &y, &y).unwrap();
        gradients.add_product(&frozen, 1.0, &x, &y).unwrap();
        gradients.add(c, &tensor(&[5.0, 6.0], &[1, 2])).unwrap();
        gradients.add(d, &tensor(&[7.0, 8.0], &[2])).unwrap();
        assert!(gradients.get(b).unwrap().is_none());
        assert!(gradients.add(b, &y).is_err());
        assert!(gradients.add_product(c, 1.0, &x, &y).is_err());
        assert!(gradients.add_product(a, 1.0, &x, &tensor(&[1.0, 2.0], &[1, 2])).is_err());

        let runs = gradients.into_runs().unwrap();
        let [first, second] = &runs[..] else { panic!("{runs:?}") };
        assert_eq!((first.tensors.clone(), second.tensors.clone()), (0..1, 2..4));
        assert_eq!(values(&first.gradient), [12.5, 8.0, 21.0, 13.5]);
        assert_eq!(values(&second.gradient), [5.0, 6.0, 7.0, 8.0]);
        assert_eq!((spans.range(&(2..4)), spans.zeros().unwrap().dims1().unwrap()), (7..11, 11));
    }
}
