//! The operator on arrays: what `still.torch` makes an op of PyTorch.
//!
//! The forward pass reads rows and writes its output where the caller has them. Learned tensors, and the operands of the backward
//! pass, are copied in; other results are handed over.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::anyhow;
use candle_core::{DType, Device, Tensor};
use numpy::{
    IntoPyArray, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use still_attention::{
    AttentionError, AttentionGradients, HostRows, HybridConfig, HybridWeights, Routing,
    SavedAttention, Selection, StillConfig, attention_into,
};
use still_compute::Real;

use crate::errors::{exception, panicked};

/// A tensor of a contiguous array, f32 or f64.
fn tensor(name: &str, array: &Bound<'_, PyAny>) -> PyResult<Tensor> {
    fn of<T: candle_core::WithDType + numpy::Element>(
        array: &PyReadonlyArrayDyn<'_, T>,
    ) -> PyResult<Tensor> {
        let values = array.as_slice()?;
        Tensor::from_slice(values, array.shape(), &Device::Cpu)
            .map_err(|error| PyTypeError::new_err(error.to_string()))
    }
    if let Ok(array) = array.extract::<PyReadonlyArrayDyn<'_, f32>>() {
        return of(&array);
    }
    if let Ok(array) = array.extract::<PyReadonlyArrayDyn<'_, f64>>() {
        return of(&array);
    }
    Err(PyTypeError::new_err(format!("{name} is no array of float32 or float64")))
}

/// An array of a tensor.
pub fn array<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    let failed = |error: candle_core::Error| exception(py, &error.into());
    let shape = tensor.dims().to_vec();
    let flat = tensor.flatten_all().map_err(failed)?;
    Ok(match tensor.dtype() {
        DType::F64 => {
            flat.to_vec1::<f64>().map_err(failed)?.into_pyarray(py).reshape(shape)?.into_any()
        }
        _ => flat.to_vec1::<f32>().map_err(failed)?.into_pyarray(py).reshape(shape)?.into_any(),
    })
}

/// What a call is computed from.
struct Operands {
    rows: [Tensor; 3],
    gate: Option<Tensor>,
    weights: HybridWeights,
    config: HybridConfig,
}

/// The learned tensors, in this order wherever they are given: two maps, their reflections, and the scales.
const LEARNED: [&str; 6] = [
    "feature_map_q",
    "feature_map_k",
    "householder_q",
    "householder_k",
    "log_lambda",
    "window_factor",
];

type Optional<'py> = Option<Bound<'py, PyAny>>;

/// The learned tensors, copied.
fn weights(learned: [Optional<'_>; 6]) -> PyResult<HybridWeights> {
    let mut learned = LEARNED
        .into_iter()
        .zip(learned)
        .map(|(name, given)| (name, given.map(|given| tensor(name, &given)).transpose()));
    let mut next = || learned.next().map_or(Ok(None), |(_, given)| given);
    let needed = |name: &str, given: Option<Tensor>| {
        given.ok_or_else(|| PyTypeError::new_err(format!("{name} is missing")))
    };
    Ok(HybridWeights {
        feature_map_q: needed("feature_map_q", next()?)?,
        feature_map_k: needed("feature_map_k", next()?)?,
        householder_q: next()?,
        householder_k: next()?,
        log_lambda: next()?,
        window_factor: next()?,
    })
}

impl Operands {
    /// `config`: the section `still` of a student's config.json.
    fn new(
        py: Python<'_>,
        rows: [Bound<'_, PyAny>; 3],
        gate: Optional<'_>,
        learned: [Optional<'_>; 6],
        config: &str,
        layer: usize,
    ) -> PyResult<Self> {
        let config = layer_config(py, config, layer)?;
        let [q, k, v] = rows;
        let rows = [tensor("q", &q)?, tensor("k", &k)?, tensor("v", &v)?];
        let gate = gate.map(|gate| tensor("gate", &gate)).transpose()?;
        let weights = weights(learned)?;
        Ok(Self { rows, gate, weights, config })
    }

    fn rows(&self) -> [&Tensor; 3] {
        self.rows.each_ref()
    }
}

/// A layer's configuration, of the section `still` of a student's config.json.
///
/// # Errors
/// Another section, a layer that it does not have.
pub fn layer_config(py: Python<'_>, section: &str, layer: usize) -> PyResult<HybridConfig> {
    serde_json::from_str::<StillConfig>(section)
        .map_err(|error| AttentionError::Config(format!("the section \"still\": {error}")))
        .and_then(|config| config.layer(layer))
        .map_err(|error| wrong(py, error))
}

/// What the operator refuses is an error of the caller.
pub fn wrong(py: Python<'_>, error: AttentionError) -> PyErr {
    match error {
        AttentionError::Tensor(error) => exception(py, &anyhow!(error)),
        other => crate::errors::input(
            py,
            &other.to_string(),
            "docs/python.md says what the operator takes",
        ),
    }
}

/// Computes without Python's lock; a panic is an exception.
pub fn compute<T: Send>(
    py: Python<'_>,
    body: impl FnOnce() -> Result<T, AttentionError> + Send,
) -> PyResult<T> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(body))) {
        Ok(result) => result.map_err(|error| wrong(py, error)),
        Err(payload) => Err(panicked(py, payload.as_ref())),
    }
}

type Arrays<'py, const N: usize> = [Bound<'py, PyAny>; N];

/// Writes the output `[B, H, N, D]` into `out` and the linear states that the sequences leave into `sums` (`S` `[2F, D]` and then `z`
/// `[2F]` of each selection head), arrays of their own. Gives from which chunk on each token is part of the linear state
/// `[B, S, N]` (int32, -1: never), and the router's scores `[B, S, N]`.
#[pyfunction]
pub fn attention<'py>(
    py: Python<'py>,
    out: &Bound<'py, PyAny>,
    sums: &Bound<'py, PyAny>,
    rows: Arrays<'py, 3>,
    gate: Optional<'py>,
    learned: [Optional<'py>; 6],
    config: &str,
    layer: usize,
) -> PyResult<Arrays<'py, 2>> {
    let config = layer_config(py, config, layer)?;
    let weights = weights(learned)?;
    let routing = match out.extract::<PyReadwriteArrayDyn<'_, f64>>() {
        Ok(out) => forward(py, (out, written("sums", sums)?), rows, gate, &weights, &config)?,
        Err(_) => {
            let to = (written::<f32>("out", out)?, written("sums", sums)?);
            forward(py, to, rows, gate, &weights, &config)?
        }
    };
    let selection = routing.selection().map_err(|error| wrong(py, error))?;
    let scores = routing.scores().map_err(|error| wrong(py, error))?;
    let shape = [selection.batch, selection.heads, selection.tokens];
    let absorbed_at: Vec<i32> =
        selection.absorbed_at.iter().map(|&chunk| i32::try_from(chunk).unwrap_or(-1)).collect();
    Ok([
        absorbed_at.into_pyarray(py).reshape(shape)?.into_any(),
        scores.to_vec().into_pyarray(py).reshape(shape)?.into_any(),
    ])
}

fn forward<T: Real + numpy::Element>(
    py: Python<'_>,
    (mut out, mut sums): (PyReadwriteArrayDyn<'_, T>, PyReadwriteArrayDyn<'_, T>),
    rows: Arrays<'_, 3>,
    gate: Optional<'_>,
    weights: &HybridWeights,
    config: &HybridConfig,
) -> PyResult<Routing> {
    let [q, k, v] = &rows;
    let arrays = [lent("q", q)?, lent("k", k)?, lent("v", v)?];
    let gate = gate.map(|gate| lent("gate", &gate)).transpose()?;
    let (out, sums) = (out.as_slice_mut()?, sums.as_slice_mut()?);
    let [q, k, v] = arrays.each_ref().map(host_rows);
    let (rows, gate) = ([q?, k?, v?], gate.as_ref().map(host_rows).transpose()?);
    compute(py, move || attention_into(rows, gate, weights, config, out, sums))
}

/// An array to write to.
pub fn written<'py, T: numpy::Element>(
    name: &str,
    array: &Bound<'py, PyAny>,
) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let expected = "float32 or float64, all of one dtype";
    array
        .extract()
        .map_err(|_| PyTypeError::new_err(format!("{name} is no array of {expected}, to write to")))
}

/// An array to read from without copying it.
pub fn lent<'py, T: numpy::Element>(
    name: &str,
    array: &Bound<'py, PyAny>,
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    array
        .extract()
        .map_err(|_| PyTypeError::new_err(format!("{name} is no array of the dtype of out")))
}

/// A contiguous array's values.
fn host_rows<'a, T: numpy::Element>(
    array: &'a PyReadonlyArrayDyn<'_, T>,
) -> PyResult<HostRows<'a, T>> {
    Ok(HostRows { values: array.as_slice()?, shape: array.shape() })
}

/// Gradients of rows, gate and learned tensors, in their order, of the call that gave `out` and `absorbed_at`.
#[pyfunction]
pub fn attention_backward<'py>(
    py: Python<'py>,
    d_out: Bound<'py, PyAny>,
    out: Bound<'py, PyAny>,
    absorbed_at: PyReadonlyArrayDyn<'py, i32>,
    rows: Arrays<'py, 3>,
    gate: Optional<'py>,
    learned: [Optional<'py>; 6],
    config: &str,
    layer: usize,
) -> PyResult<(Arrays<'py, 3>, Optional<'py>, [Optional<'py>; 6])> {
    let operands = Operands::new(py, rows, gate, learned, config, layer)?;
    let (d_out, out) = (tensor("d_out", &d_out)?, tensor("out", &out)?);
    let &[batch, heads, tokens] = absorbed_at.shape() else {
        return Err(PyTypeError::new_err("absorbed_at has not three dimensions"));
    };
    let never = |&chunk: &i32| u32::try_from(chunk).unwrap_or(Selection::NEVER);
    let absorbed_at = absorbed_at.as_slice()?.iter().map(never).collect();
    let chunk = operands.config.chunk;
    let routing = Routing::from(Selection { chunk, batch, heads, tokens, absorbed_at });
    let (of_rows, of_weights) = compute(py, move || {
        let Operands { gate, weights, config, .. } = &operands;
        let rows = operands.rows();
        let known = (&out, &routing);
        SavedAttention::of_output(rows, gate.as_ref(), weights, config, known, true)?
            .gradients(&d_out)
    })?;
    let AttentionGradients { qkv, gate } = of_rows;
    let Some([q, k, v]) = qkv else {
        return Err(exception(py, &anyhow!("the operator gave no gradients of rows")));
    };
    let optional = |tensor: Option<Tensor>| tensor.map(|tensor| array(py, &tensor)).transpose();
    let HybridWeights {
        feature_map_q,
        feature_map_k,
        householder_q,
        householder_k,
        log_lambda,
        window_factor,
    } = of_weights;
    Ok((
        [array(py, &q)?, array(py, &k)?, array(py, &v)?],
        optional(gate)?,
        [
            optional(Some(feature_map_q))?,
            optional(Some(feature_map_k))?,
            optional(householder_q)?,
            optional(householder_k)?,
            optional(log_lambda)?,
            optional(window_factor)?,
        ],
    ))
}
