//! The dtype of exact rows in the attention cache.

use candle_core::DType;
use clap::Args;
use still_attention::RowDtype;
use still_model::Model;

use super::model::Place;
use crate::args::one_of;
use crate::errors::user;
use crate::printer::Printer;

/// How the attention cache stores exact rows.
#[derive(Clone, Debug, Args)]
pub struct CacheArgs {
    /// How the attention cache stores exact keys and values; int8 and int4 leave a student's window as it is [default: as the
    /// student says, else bf16, of `still eval` f32; on CUDA as --compute-dtype, unless the student says int8 or int4]
    #[arg(long, value_name = "FORMAT", value_parser = one_of(&RowDtype::ALL, RowDtype::name))]
    cache_dtype: Option<RowDtype>,
}

/// How a command's caches store exact rows: what was asked for, else what the student says, else what is usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheRows {
    /// The format that was asked for.
    pub asked: Option<RowDtype>,
    usual: RowDtype,
}

impl CacheArgs {
    /// `usual`: the command's format on the CPU, of models that say none. On CUDA it is that of the computation.
    ///
    /// # Errors
    /// Another format on CUDA than that of the computation or one of fewer bits.
    pub fn resolve(&self, place: &Place, usual: RowDtype) -> anyhow::Result<CacheRows> {
        let asked = self.cache_dtype;
        if place.device.is_cpu() {
            return Ok(CacheRows { asked, usual });
        }
        let computed = if place.dtype == DType::BF16 { RowDtype::Bf16 } else { RowDtype::F32 };
        match asked {
            Some(rows) if rows != computed && !rows.is_coded() => Err(user(
                format!(
                    "a cache on CUDA stores rows as it computes, in {}, or in int8 or int4, not in {}",
                    place.dtype.as_str(),
                    rows.name()
                ),
                "leave --cache-dtype out, or change --compute-dtype",
            )),
            _ => Ok(CacheRows { asked, usual: computed }),
        }
    }
}

impl CacheRows {
    /// Of attention without a student.
    pub fn alone(self) -> RowDtype {
        self.asked.unwrap_or(self.usual)
    }

    /// Of a model's caches.
    pub fn of(self, model: &Model) -> RowDtype {
        self.asked.unwrap_or_else(|| model.cache_rows(self.usual))
    }

    /// [`CacheRows::of`], which is told where a student says how its rows are stored.
    pub fn told(self, model: &Model, printer: &Printer) -> RowDtype {
        let rows = self.of(model);
        if let Some(said) = model.student.as_ref().and_then(|student| student.config.rows) {
            let why = match self.asked {
                _ if rows == said => "as the student says".to_owned(),
                Some(_) => format!("as --cache-dtype says; the student says {said}"),
                None => format!("as it computes on CUDA; the student says {said}"),
            };
            printer.step("Storing", format_args!("exact rows in {rows}, {why}"));
        }
        rows
    }
}
