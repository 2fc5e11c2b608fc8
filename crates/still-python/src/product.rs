//! Products of many rows with a matrix, for `still.torch`.

use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;
use still_compute::matmul::Tiles;

use crate::errors::input;
use crate::operator::{compute, lent, written};

/// Whether this CPU has what [`linear`] takes.
#[pyfunction]
pub fn multiplies_rows() -> bool {
    Tiles::find().is_some()
}

/// `x` `[M, K]` times the transpose of `weight` `[N, K]` into `out` `[M, N]`, all float32.
#[pyfunction]
pub fn linear<'py>(
    py: Python<'py>,
    out: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let Some(tiles) = Tiles::find() else {
        let hint =
            "multiply with torch.nn.functional.linear; still.torch.has_linear says so beforehand";
        return Err(input(
            py,
            "this CPU has no AMX for bfloat16, or the system does not grant it",
            hint,
        ));
    };
    let mut out = written::<f32>("out", out)?;
    let (x, weight) = (lent::<f32>("x", x)?, lent::<f32>("weight", weight)?);
    let (&[m, k], &[n, columns]) = (x.shape(), weight.shape()) else {
        return Err(input(py, "x and weight are to have two dimensions", "give [M, K] and [N, K]"));
    };
    if columns != k || out.shape() != [m, n] {
        let shapes =
            format!("x {:?}, weight {:?}, out {:?}", x.shape(), weight.shape(), out.shape());
        return Err(input(py, &shapes, "give [M, K], [N, K] and [M, N]"));
    }
    let (x, weight, out) = (x.as_slice()?, weight.as_slice()?, out.as_slice_mut()?);
    compute(py, move || {
        tiles.linear((m, n, k), x, weight, out);
        Ok(())
    })
}
