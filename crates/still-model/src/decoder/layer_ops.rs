//! The operations that a decoder layer is written in, and what each is given.
//!
//! [`DecoderLayer`](super::DecoderLayer) says once what a layer computes; an implementation of [`LayerOps`] says how: on tensors
//! ([`TensorOps`](super::TensorOps)), on plain slices by all threads (`crate::executor`), with one CUDA kernel for a small batch
//! (there too), or saving what a backward pass needs ([`SavingOps`](super::SavingOps)).

use std::borrow::Cow;

use candle_core::{DType, Tensor};
use smallvec::SmallVec;

use super::linear::{Linear, Lora};
use crate::config::Activation;
use crate::error::{ModelError, Result};

/// A root-mean-square norm.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'w> {
    /// `[width]`
    pub weight: &'w Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

/// Which rotation a layer's queries and keys take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeBase {
    /// That of layers which attend to everything before: by `rope_theta`, scaled.
    Global,
    /// That of layers with a sliding window, where a family has one.
    Local,
}

/// Which of a layer's projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Role {
    Query,
    Key,
    Value,
    OutputGate,
    Output,
    MlpGate,
    MlpUp,
    MlpDown,
}

/// A projection as a layer uses it.
#[derive(Clone, Debug)]
pub struct Projection<'w> {
    /// Which it is.
    pub role: Role,
    /// Weight and bias.
    pub linear: Cow<'w, Linear>,
    /// Its low-rank update.
    pub lora: Option<&'w Lora>,
    /// The weight, where it is itself learned.
    pub learned: Option<&'w Tensor>,
}

impl<'w> Projection<'w> {
    /// A frozen projection, perhaps with an update.
    pub fn new(role: Role, linear: &'w Linear, lora: Option<&'w Lora>) -> Self {
        Self { role, linear: Cow::Borrowed(linear), lora, learned: None }
    }

    /// A projection whose weight `[out, in]` is learned; `dtype` is that of activations, which the weight may be wider than.
    ///
    /// # Errors
    /// An error of the tensor library.
    pub fn learned(
        role: Role,
        weight: &'w Tensor,
        lora: Option<&'w Lora>,
        dtype: DType,
    ) -> candle_core::Result<Self> {
        let linear = Linear { weight: weight.detach().to_dtype(dtype)?.into(), bias: None };
        Ok(Self { role, linear: Cow::Owned(linear), lora, learned: Some(weight) })
    }
}

/// The results of a call of [`LayerOps::project`], in the order of its projections.
pub type Projected<R> = SmallVec<[R; 4]>;

/// How the operations of a layer are carried out.
pub trait LayerOps<'w> {
    /// Activations, a row a token.
    type Rows;
    /// Rows as projections take them: perhaps still to be normed.
    type Input;
    /// Queries, keys, values or a gate, by head.
    type Heads;

    /// The norm of rows.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn norm(&mut self, x: &Self::Rows, norm: Norm<'w>) -> Result<Self::Input>;

    /// Rows as they are.
    fn input(&mut self, x: &Self::Rows) -> Self::Input;

    /// Several projections of the same rows.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn project(
        &mut self,
        x: &Self::Input,
        projections: &[Projection<'w>],
    ) -> Result<Projected<Self::Rows>>;

    /// `onto` plus a projection of `x`, through a norm if there is one.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn project_onto(
        &mut self,
        onto: Self::Rows,
        x: &Self::Input,
        projection: Projection<'w>,
        norm: Option<Norm<'w>>,
    ) -> Result<Self::Rows>;

    /// `activation(gate(x)) ⊙ up(x)`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn gated(
        &mut self,
        x: &Self::Input,
        gate: Projection<'w>,
        up: Projection<'w>,
        activation: Activation,
    ) -> Result<Self::Input>;

    /// Rows by head; queries and keys through their heads' norm, if there is one, and rotated (RoPE).
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn heads(
        &mut self,
        rows: Self::Rows,
        norm: Option<Norm<'w>>,
        rope: Option<RopeBase>,
    ) -> Result<Self::Heads>;

    /// The output gate, by head: the sigmoid of rows.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn output_gate(&mut self, rows: Self::Rows) -> Result<Self::Heads>;
}

/// The next of a call's results.
pub(super) fn next<R>(rows: &mut impl Iterator<Item = R>) -> Result<R> {
    rows.next().ok_or_else(|| ModelError::Invalid("a projection of a layer is missing".into()))
}
