//! How the attention cache stores exact rows.

use candle_core::DType;
use clap::Args;
use still_attention::RowDtype;

use super::model::Place;
use crate::args::one_of;
use crate::errors::user;

/// How the attention cache stores exact rows.
#[derive(Clone, Debug, Args)]
pub struct CacheArgs {
    /// How the attention cache stores exact keys and values; int8 and int4 leave a student's window as it is [default: bf16, of
    /// `still eval` f32; on CUDA as --compute-dtype]
    #[arg(long, value_name = "FORMAT", value_parser = one_of(&RowDtype::ALL, RowDtype::name))]
    cache_dtype: Option<RowDtype>,
}

impl CacheArgs {
    /// The format that was asked for.
    pub fn asked(&self) -> Option<RowDtype> {
        self.cache_dtype
    }

    /// On the CPU the format that was asked for, or `usual`; on CUDA that of the computation, unless fewer bits were asked for.
    ///
    /// # Errors
    /// Another format on CUDA.
    pub fn resolve(&self, place: &Place, usual: RowDtype) -> anyhow::Result<RowDtype> {
        if place.device.is_cpu() {
            return Ok(self.cache_dtype.unwrap_or(usual));
        }
        let computed = if place.dtype == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 };
        match self.cache_dtype {
            Some(rows @ (RowDtype::Int8 | RowDtype::Int4)) => Ok(rows),
            Some(rows) if rows != computed => Err(user(
                format!(
                    "a cache on CUDA stores rows as it computes, in {}, or in int8 or int4, not in {}",
                    place.dtype.as_str(),
                    rows.name()
                ),
                "leave --cache-dtype out, or change --compute-dtype",
            )),
            _ => Ok(computed),
        }
    }
}
