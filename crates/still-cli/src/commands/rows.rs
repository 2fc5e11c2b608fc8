//! How exact rows of the attention cache are stored.

use candle_core::DType;
use clap::builder::TypedValueParser;
use still_attention::RowDtype;
use still_model::Model;

use crate::args::one_of;

/// The parser of `--cache-dtype`.
pub fn cache_dtype() -> impl TypedValueParser<Value = RowDtype> {
    one_of(&RowDtype::ALL, RowDtype::name)
}

/// A format that was asked for, or what a model's device decides.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    asked: Option<RowDtype>,
    /// On the CPU, unless another is asked for.
    usual: RowDtype,
}

impl Rows {
    /// `asked`, or else `usual` on the CPU and the weights' dtype on a device.
    pub fn new(asked: Option<RowDtype>, usual: RowDtype) -> Self {
        Self { asked, usual }
    }

    /// Those of a model's cache.
    pub fn of(self, model: &Model) -> RowDtype {
        match self.asked {
            Some(rows) => rows,
            None if model.device().is_cpu() => self.usual,
            None if model.decoder.dtype() == DType::BF16 => RowDtype::Bf16,
            None => RowDtype::F32,
        }
    }
}
