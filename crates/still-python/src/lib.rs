//! The Rust part of the Python package `still`: an extension module that the package's Python modules wrap.
//!
//! | file | content |
//! |---|---|
//! | `work` | work without Python's lock, on a thread of its own, that Ctrl-C ends |
//! | `errors` | errors as Python's exceptions, panics among them |
//! | `callback` | callables that are told of progress |
//! | `arguments` | what callers give: tokens, paths, lists, names |
//! | `model` | models: load, tokenize, logits, save |
//! | `generate` | generation, whole and as an iterator |
//! | `state` | what a model remembers of a sequence: read, fork, save, restore |
//! | `training` | calibration and both training stages |
//! | `evaluate` | tasks |
//! | `operator` | the operator on arrays, for PyTorch |
//! | `cuda_operator` | the same in PyTorch's memory on CUDA devices |
//! | `product` | products of many float32 rows on CPUs with AMX, for PyTorch |
//! | `pieces` | a run's recipe, windows and folder, for PyTorch |
//! | `questions` | what a run asks its student between steps, for PyTorch |
//! | `command` | the `still` command |
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod arguments;
mod callback;
mod command;
mod cuda_operator;
mod errors;
mod evaluate;
mod generate;
mod model;
mod operator;
mod pieces;
mod product;
mod questions;
mod state;
mod training;
mod work;

/// `still._still`.
#[pyo3::pymodule]
mod _still {
    #[pymodule_export]
    use crate::command::run_command;
    #[pymodule_export]
    use crate::cuda_operator::CudaAttention;
    #[pymodule_export]
    use crate::evaluate::evaluate;
    #[pymodule_export]
    use crate::generate::{Generation, Stream};
    #[pymodule_export]
    use crate::model::Model;
    #[pymodule_export]
    use crate::operator::{attention, attention_backward};
    #[pymodule_export]
    use crate::pieces::{Windows, begin_student, finish_student, resolve_recipe};
    #[pymodule_export]
    use crate::product::{linear, multiplies_rows};
    #[pymodule_export]
    use crate::questions::Questions;
    #[pymodule_export]
    use crate::state::State;
    #[pymodule_export]
    use crate::training::{calibrate, linearize};
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::errors::keep_panics_quiet();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
