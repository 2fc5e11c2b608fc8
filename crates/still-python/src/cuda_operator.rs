//! The operator on tensors of PyTorch on CUDA devices: what `still/_cuda.py` calls.
//!
//! It takes addresses, and copies nothing: PyTorch owns all memory, scratch too. Kernels are queued on the stream that is given, so
//! that they run after what PyTorch queued there before, and before what it queues there next. A wheel without CUDA refuses to
//! make a [`CudaAttention`].

use pyo3::prelude::*;
use still_attention::HybridConfig;

use crate::operator::{layer_config, wrong};

/// Where rows `[B, heads, N, D]` begin, and their strides in values.
type Rows = (usize, [i64; 4]);
/// Sequences, query heads, selection heads, tokens, channels.
type Sizes = [usize; 5];
/// `q`, `k`, `v`, gate; `log_scale` (0: none), budgets, `absorbed_at`; where what is saved begins, and its bytes.
type Operands = (Rows, Rows, Rows, Option<Rows>, usize, usize, usize, (usize, usize));
/// The two maps and what they reflect by (0: nothing).
type Maps = [usize; 4];
/// `out`, `d_out`, `d_linear`; gradients of `q`, `k`, `v` and gate, of the two maps and `log_scale` (0: none).
type Gradients = (Rows, Rows, Rows, Rows, Rows, Rows, Option<Rows>, usize, usize, usize);
type Shape = Vec<usize>;

/// One layer's attention.
#[pyclass(frozen, module = "still._still")]
pub struct CudaAttention {
    config: HybridConfig,
}

#[pymethods]
impl CudaAttention {
    /// `config`: the section `still` of a student's config.json.
    #[new]
    fn new(py: Python<'_>, config: &str, layer: usize) -> PyResult<Self> {
        kernels::available(py)?;
        Ok(Self { config: layer_config(py, config, layer)? })
    }

    /// The most salient tokens of a head.
    #[getter]
    fn cap(&self) -> Option<usize> {
        self.config.cap
    }

    /// Tokens that each selection head keeps of a retired chunk.
    #[getter]
    fn budgets(&self) -> Vec<i32> {
        kernels::budgets(&self.config)
    }

    /// Refuses shapes of `q`, `k`, `v`, gate and learned tensors that do not fit, or have no kernels.
    fn check(
        &self,
        py: Python<'_>,
        rows: [Shape; 3],
        gate: Option<Shape>,
        learned: [Option<Shape>; 6],
    ) -> PyResult<()> {
        kernels::check(&self.config, &rows, gate.as_ref(), &learned)
            .map_err(|error| wrong(py, error))
    }

    /// Bytes of scratch of the forward pass, how many of its first must be zeros, and bytes of scratch of the backward pass.
    fn scratch(
        &self,
        py: Python<'_>,
        sizes: Sizes,
        narrow: bool,
    ) -> PyResult<(usize, usize, usize)> {
        kernels::scratch(&self.config, sizes, narrow).map_err(|error| wrong(py, error))
    }

    /// Queues the forward pass on a stream of the current device. If nothing `trains`, no backward pass may follow.
    fn forward(
        &self,
        py: Python<'_>,
        sizes: Sizes,
        narrow: bool,
        operands: Operands,
        maps: Maps,
        out: Rows,
        trains: bool,
        scores: usize,
        scratch: usize,
        stream: usize,
    ) -> PyResult<()> {
        crate::operator::compute(py, || {
            let to = (out, trains, scores, scratch);
            kernels::forward(&self.config, sizes, narrow, (operands, maps), to, stream)
        })
    }

    /// Queues the backward pass of the call that left what `operands` says.
    fn backward(
        &self,
        py: Python<'_>,
        sizes: Sizes,
        narrow: bool,
        operands: Operands,
        gradients: Gradients,
        scratch: usize,
        stream: usize,
    ) -> PyResult<()> {
        crate::operator::compute(py, || {
            kernels::backward(&self.config, sizes, narrow, operands, gradients, scratch, stream)
        })
    }
}

#[cfg(feature = "cuda")]
mod kernels {
    use candle_core::DType;
    use pyo3::prelude::*;
    use still_attention::{
        AttentionError, DeviceAttention, DeviceGradients, DeviceMaps, DeviceOperands, DeviceRows,
        DeviceSizes, HybridConfig, OperandShapes, Result, check_shapes,
    };

    use super::{Gradients, Maps, Operands, Rows, Shape, Sizes};

    pub fn available(_: Python<'_>) -> PyResult<()> {
        Ok(())
    }

    pub fn budgets(config: &HybridConfig) -> Vec<i32> {
        DeviceAttention::budgets_of(config)
    }

    pub fn check(
        config: &HybridConfig,
        rows: &[Shape; 3],
        gate: Option<&Shape>,
        learned: &[Option<Shape>; 6],
    ) -> Result<()> {
        let shapes = OperandShapes {
            rows: rows.each_ref().map(Vec::as_slice),
            gate: gate.map(Vec::as_slice),
            learned: learned.each_ref().map(Option::as_deref),
        };
        check_shapes(config, shapes)
    }

    fn attention(config: &HybridConfig, sizes: Sizes, narrow: bool) -> Result<DeviceAttention<'_>> {
        let [batch, heads, selection_heads, tokens, head_dim] = sizes;
        let dtype = if narrow { DType::BF16 } else { DType::F32 };
        let sizes = DeviceSizes { batch, heads, selection_heads, tokens, head_dim, dtype };
        DeviceAttention::new(config, sizes)
    }

    pub fn scratch(
        config: &HybridConfig,
        sizes: Sizes,
        narrow: bool,
    ) -> Result<(usize, usize, usize)> {
        let attention = attention(config, sizes, narrow)?;
        let (forward, zeros) = attention.forward_scratch();
        Ok((forward, zeros, attention.backward_scratch()?))
    }

    fn rows((address, [batch, head, token, _]): Rows) -> DeviceRows {
        DeviceRows { data: pointer(address), batch, head, token }
    }

    /// An address that PyTorch gave, or null.
    fn pointer<T>(address: usize) -> *mut T {
        std::ptr::with_exposed_provenance_mut(address)
    }

    fn device_operands(attention: &DeviceAttention<'_>, given: Operands) -> Result<DeviceOperands> {
        let (q, k, v, gate, log_scale, budgets, absorbed_at, (saved, bytes)) = given;
        let expected = attention.saved_bytes(gate.is_some());
        if bytes != expected {
            let what = format!("what is saved has {bytes} bytes, the kernels need {expected}");
            return Err(AttentionError::Tensor(candle_core::Error::Msg(what)));
        }
        Ok(DeviceOperands {
            q: rows(q),
            k: rows(k),
            v: rows(v),
            gate: gate.map(rows),
            log_scale: pointer(log_scale),
            budgets: pointer(budgets),
            absorbed_at: pointer(absorbed_at),
            saved: pointer(saved),
        })
    }

    pub fn forward(
        config: &HybridConfig,
        sizes: Sizes,
        narrow: bool,
        (operands, maps): (Operands, Maps),
        (out, trains, scores, scratch): (Rows, bool, usize, usize),
        stream: usize,
    ) -> Result<()> {
        let attention = attention(config, sizes, narrow)?;
        let operands = device_operands(&attention, operands)?;
        let [map_q, map_k, householder_q, householder_k] = maps.map(pointer::<f32>);
        let maps = DeviceMaps { map_q, map_k, householder_q, householder_k };
        let (out, scores, scratch) = ((rows(out), trains), pointer(scores), pointer(scratch));
        // SAFETY: `still/_cuda.py` gives memory of these sizes on the current device, allocated for this very stream.
        unsafe { attention.forward(&operands, &maps, out, scores, scratch, pointer(stream)) }
    }

    pub fn backward(
        config: &HybridConfig,
        sizes: Sizes,
        narrow: bool,
        operands: Operands,
        gradients: Gradients,
        scratch: usize,
        stream: usize,
    ) -> Result<()> {
        let attention = attention(config, sizes, narrow)?;
        let operands = device_operands(&attention, operands)?;
        let (out, d_out, d_linear, d_q, d_k, d_v, d_gate, d_map_q, d_map_k, d_log_scale) =
            gradients;
        let to = DeviceGradients {
            out: rows(out),
            d_out: rows(d_out),
            d_linear: rows(d_linear),
            d_q: rows(d_q),
            d_k: rows(d_k),
            d_v: rows(d_v),
            d_gate: d_gate.map(rows),
            d_map_q: pointer(d_map_q),
            d_map_k: pointer(d_map_k),
            d_log_scale: pointer(d_log_scale),
        };
        // SAFETY: as above.
        unsafe { attention.backward(&operands, &to, pointer(scratch), pointer(stream)) }
    }
}

/// A wheel without CUDA: nothing but the error, as no [`CudaAttention`] is ever made.
#[cfg(not(feature = "cuda"))]
mod kernels {
    use pyo3::prelude::*;
    use still_attention::{AttentionError, HybridConfig, Result};

    use super::{Gradients, Maps, Operands, Rows, Shape, Sizes};
    use crate::errors::input;

    const WITHOUT: &str = "this package of still was built without CUDA";

    pub fn available(py: Python<'_>) -> PyResult<()> {
        let hint = "move the tensors to the CPU, or install a wheel that `scripts/wheel.sh --features cuda` built";
        Err(input(py, &format!("tensors on CUDA: {WITHOUT}"), hint))
    }

    fn without<T>() -> Result<T> {
        Err(AttentionError::Config(WITHOUT.into()))
    }

    pub fn budgets(_: &HybridConfig) -> Vec<i32> {
        Vec::new()
    }

    pub fn check(
        _: &HybridConfig,
        _: &[Shape; 3],
        _: Option<&Shape>,
        _: &[Option<Shape>; 6],
    ) -> Result<()> {
        without()
    }

    pub fn scratch(_: &HybridConfig, _: Sizes, _: bool) -> Result<(usize, usize, usize)> {
        without()
    }

    pub fn forward(
        _: &HybridConfig,
        _: Sizes,
        _: bool,
        _: (Operands, Maps),
        _: (Rows, bool, usize, usize),
        _: usize,
    ) -> Result<()> {
        without()
    }

    pub fn backward(
        _: &HybridConfig,
        _: Sizes,
        _: bool,
        _: Operands,
        _: Gradients,
        _: usize,
        _: usize,
    ) -> Result<()> {
        without()
    }
}
