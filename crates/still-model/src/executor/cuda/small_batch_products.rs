//! Products of a small batch's rows: one kernel for several matrices, with the norm before them and what is added after.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use candle_core::{DType, Result, Tensor, bail};
use still_compute::cuda::{StepMemory, StepTensor, kind, queue_into};
use still_kernels::decoder::{
    FACTORS, Factor as Place, PLAIN, SMALL_BATCH_ROWS, SmallBatchProducts,
    still_small_batch_products,
};

use crate::decoder::{Lora, QuantizedMatrix, Weight};

/// Rows of a small batch; more where all matrices are quantized ([`QuantizedMatrix::most_rows`]).
pub(super) const MOST: usize = SMALL_BATCH_ROWS;

/// What widths are multiples of.
pub(super) const UNIT: usize = 8;

/// The rows `x` `[rows, in]`, and the weight and ε of the norm that they go through first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Normed<'a> {
    pub x: &'a Tensor,
    pub norm: Option<(&'a Tensor, f64)>,
    /// Where products lie.
    pub memory: &'a StepMemory,
}

/// A matrix `[out, in]` and what its product is added to.
#[derive(Clone, Debug)]
pub(super) struct Factor<'a> {
    /// What its product is in the step's memory.
    pub name: StepTensor,
    pub matrix: Matrix<'a>,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// `[rows, out]`
    pub add: Option<&'a Tensor>,
    /// With `x Aᵀ`, `[rows, rank]` f32.
    pub update: Option<(&'a Lora, Tensor)>,
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Matrix<'a> {
    Plain(&'a Tensor),
    Quantized(&'a QuantizedMatrix),
}

impl Matrix<'_> {
    fn dims2(self) -> Result<(usize, usize)> {
        match self {
            Self::Plain(tensor) => tensor.dims2(),
            Self::Quantized(matrix) => Ok(matrix.dims2()),
        }
    }

    /// As the kernels name it.
    fn format(self) -> i32 {
        match self {
            Self::Plain(_) => PLAIN,
            Self::Quantized(matrix) => matrix.code(),
        }
    }
}

impl<'a> Factor<'a> {
    /// The matrix alone.
    pub fn new(name: StepTensor, weight: &'a Tensor) -> Self {
        Self { name, matrix: Matrix::Plain(weight), bias: None, add: None, update: None }
    }

    /// The matrix alone, however it is stored.
    ///
    /// # Errors
    /// One that is packed for the CPU.
    pub fn of(name: StepTensor, weight: &'a Weight) -> Result<Self> {
        let matrix = match weight {
            Weight::Dense(tensor) => Matrix::Plain(tensor),
            Weight::Quantized(matrix) => Matrix::Quantized(matrix),
            Weight::Packed(_) => bail!("small-batch products: a matrix that is packed for the CPU"),
        };
        Ok(Self { name, matrix, bias: None, add: None, update: None })
    }
}

impl Normed<'_> {
    /// The products with `factors`, each `[rows, out]` of `dtype`, which is that of `x` or f32.
    ///
    /// # Errors
    /// Shapes or dtypes that have no kernel; more rows or factors than a kernel takes.
    pub fn products(self, factors: &[Factor<'_>], dtype: DType) -> Result<Vec<Tensor>> {
        self.run(factors, dtype, false)
    }

    /// `silu(x gateᵀ) ⊙ x upᵀ`, `[rows, out]`.
    ///
    /// # Errors
    /// As [`Normed::products`].
    pub fn gated(self, gate: (StepTensor, &Weight), up: (StepTensor, &Weight)) -> Result<Tensor> {
        let factors = [Factor::of(gate.0, gate.1)?, Factor::of(up.0, up.1)?];
        let [gate, up] = factors.each_ref().map(|factor| factor.matrix);
        if gate.dims2()? != up.dims2()? {
            bail!("small-batch products: gate {:?} and up {:?} differ", gate.dims2()?, up.dims2()?)
        }
        if gate.format() != up.format() {
            let both = self.run(&factors, self.x.dtype(), false)?;
            return both[0].silu()?.mul(&both[1]);
        }
        Ok(self.run(&factors, self.x.dtype(), true)?.remove(0))
    }

    fn run(self, factors: &[Factor<'_>], dtype: DType, gated: bool) -> Result<Vec<Tensor>> {
        let (rows, inner) = self.x.dims2()?;
        let (row_dtype, weight_dtype) = (self.x.dtype(), self.weight_dtype(factors)?);
        let mut inputs = Inputs::default();
        let x = inputs.place(Some(self.x), &[rows, inner], row_dtype)?;
        let norm = inputs.place(self.norm.map(|(weight, _)| weight), &[inner], row_dtype)?;
        let mut places = Vec::with_capacity(factors.len());
        let mut outputs = Vec::with_capacity(factors.len());
        for factor in factors {
            let placed =
                Placed::new(&mut inputs, factor, [rows, inner], [row_dtype, weight_dtype])?;
            if outputs.is_empty() || !gated {
                let shape = (rows, placed.out);
                outputs.push(self.memory.tensor(factor.name, shape, dtype, self.x.device())?);
            }
            places.push(placed);
        }
        let (kind_of_x, kind_of_weights, kind_of_outputs) =
            (kind(row_dtype)?, kind(weight_dtype)?, kind(dtype)?);
        let inputs: Vec<&Tensor> = inputs.0.iter().collect();
        queue_into("still_small_batch_products", &inputs, &outputs, |from, to, stream| {
            let at = |place: Option<usize>| place.map_or(null(), |place| from[place].cast_const());
            let args = SmallBatchProducts {
                dtype: kind_of_x,
                weight_dtype: kind_of_weights,
                to_dtype: kind_of_outputs,
                rows: rows as i32,
                inner: inner as i32,
                count: factors.len() as i32,
                gated: i32::from(gated),
                eps: self.norm.map_or(0.0, |(_, eps)| eps as f32),
                x: at(x),
                norm: at(norm),
            };
            let places = places.iter().enumerate();
            let factors: Vec<Place> = places
                .map(|(n, place)| place.resolve(at, to.get(n).copied().unwrap_or(null_mut())))
                .collect();
            // SAFETY: every tensor is contiguous and as large as decoder.h says, which `place` has seen to; a gated product
            // writes to the first alone.
            unsafe { still_small_batch_products(&raw const args, factors.as_ptr(), stream) }
        })?;
        Ok(outputs)
    }

    /// The dtype of matrices that are not quantized, if one kernel takes the rows and all factors.
    fn weight_dtype(&self, factors: &[Factor<'_>]) -> Result<DType> {
        let (rows, inner) = self.x.dims2()?;
        let plain = factors.iter().find_map(|factor| match factor.matrix {
            Matrix::Plain(tensor) => Some(tensor.dtype()),
            Matrix::Quantized(_) => None,
        });
        let most = match plain {
            Some(_) => MOST,
            None => QuantizedMatrix::most_rows(self.x.dtype()),
        };
        if factors.is_empty()
            || rows > most
            || factors.len() > FACTORS
            || !inner.is_multiple_of(UNIT)
        {
            bail!("small-batch products: {rows} rows of {inner} values, {} matrices", factors.len())
        }
        Ok(plain.unwrap_or(self.x.dtype()))
    }
}

/// The tensors that a kernel reads, contiguous.
#[derive(Default)]
struct Inputs(Vec<Tensor>);

impl Inputs {
    /// Where among the inputs a tensor is, once it is known to be what the kernel takes it for.
    fn place(
        &mut self,
        tensor: Option<&Tensor>,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Option<usize>> {
        let Some(tensor) = tensor else { return Ok(None) };
        let count: usize = shape.iter().product();
        if tensor.elem_count() != count || tensor.dtype() != dtype {
            let (dims, got) = (tensor.dims(), tensor.dtype());
            bail!("small-batch products: expected {shape:?} {dtype:?}, got {dims:?} {got:?}")
        }
        self.0.push(tensor.detach().contiguous()?);
        Ok(Some(self.0.len() - 1))
    }
}

/// A factor, its tensors by their places among the inputs.
struct Placed {
    out: usize,
    rank: usize,
    format: i32,
    update_scale: f64,
    weight: Option<usize>,
    bias: Option<usize>,
    add: Option<usize>,
    update: Option<usize>,
    low: Option<usize>,
}

impl Placed {
    fn new(
        inputs: &mut Inputs,
        factor: &Factor<'_>,
        [rows, inner]: [usize; 2],
        [row_dtype, weight_dtype]: [DType; 2],
    ) -> Result<Self> {
        let Factor { matrix, bias, add, update, .. } = factor;
        let (out, width) = matrix.dims2()?;
        if width != inner {
            bail!("small-batch products: {matrix:?} times rows of {inner}")
        }
        let rank = update.as_ref().map_or(Ok(0), |(lora, _)| lora.a.dim(0))?;
        let weight = match *matrix {
            Matrix::Plain(tensor) => inputs.place(Some(tensor), &[out, inner], weight_dtype)?,
            Matrix::Quantized(matrix) => {
                let words = matrix.words();
                inputs.place(Some(words), words.dims(), DType::U32)?
            }
        };
        let (matrix_b, low) = update.as_ref().map(|(lora, low)| (&lora.b, low)).unzip();
        Ok(Self {
            out,
            rank,
            format: matrix.format(),
            update_scale: update.as_ref().map_or(0.0, |(lora, _)| lora.scale),
            weight,
            bias: inputs.place(*bias, &[out], row_dtype)?,
            add: inputs.place(*add, &[rows, out], row_dtype)?,
            update: inputs.place(matrix_b, &[out, rank], DType::F32)?,
            low: inputs.place(low, &[rows, rank], DType::F32)?,
        })
    }

    /// As the kernel takes it: `at` has the inputs' addresses.
    fn resolve(&self, at: impl Fn(Option<usize>) -> *const c_void, to: *mut c_void) -> Place {
        Place {
            out: self.out as i32,
            rank: self.rank as i32,
            format: self.format,
            update_scale: self.update_scale as f32,
            weight: at(self.weight),
            bias: at(self.bias),
            add: at(self.add),
            update: at(self.update).cast(),
            low: at(self.low).cast(),
            to,
        }
    }
}
