//! Arguments and settings of `still bench attention`.

use candle_core::DType;
use clap::{Args, ValueEnum};
use still_attention::{HeadGeometry, RowDtype};
use still_eval::operator::{Hybrid, Pass};
use still_model::random::shape as shape_of;

use crate::args::{COUNT, TOKENS, WIDTH, one_of, whole};
use crate::commands::bench::{OutputArgs, StateArgs, something_to_time};
use crate::commands::model::{DeviceArgs, Place};
use crate::commands::{BUDGET, CHUNK};
use crate::errors::user;

const EXAMPLES: &str = "\
Examples:
  still bench attention --contexts 2048,8192
  still bench attention --device cuda --variants dense,still --json
  still bench attention --heads 9 --kv-heads 3 --head-dim 64 --passes forward";

/// `still bench attention`
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct AttentionBenchArgs {
    /// Heads of this shape: smollm2-135m, llama-3.2-1b or llama-3.1-8b
    #[arg(long, value_name = "NAME", default_value = "llama-3.1-8b")]
    shape: String,
    /// Query heads [default: those of --shape]
    #[arg(long, value_name = "N", value_parser = whole(0, WIDTH))]
    heads: Option<usize>,
    /// Key/value heads [default: those of --shape]
    #[arg(long, value_name = "N", value_parser = whole(0, WIDTH))]
    kv_heads: Option<usize>,
    /// Channels of a head [default: those of --shape]
    #[arg(long, value_name = "N", value_parser = whole(0, WIDTH))]
    head_dim: Option<usize>,
    /// Where it computes.
    #[command(flatten)]
    device: DeviceArgs,
    /// Tokens of a sequence [default: 2048,8192 on the CPU, 8192,131072 on CUDA]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = whole(0, TOKENS))]
    contexts: Option<Vec<usize>>,
    /// Attention to time, each at every context
    #[arg(
        long,
        value_name = "V,…",
        value_delimiter = ',',
        value_enum,
        default_value = "dense,still"
    )]
    variants: Vec<Variant>,
    /// Passes to time [default: all that a variant has]
    #[arg(long, value_name = "P,…", value_delimiter = ',', value_parser = one_of(&Pass::ALL, Pass::name))]
    passes: Option<Vec<Pass>>,
    /// Salient tokens of every 64 of the variant `still`
    #[arg(long, value_name = "N", default_value_t = BUDGET, value_parser = whole(0, TOKENS))]
    budget: usize,
    /// What is decoded with.
    #[command(flatten)]
    state: StateArgs,
    /// Repetitions that are timed
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = whole(1, COUNT))]
    repetitions: usize,
    /// How results are printed.
    #[command(flatten)]
    output: OutputArgs,
}

/// Attention that is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// Softmax attention.
    Dense,
    /// --budget tokens kept of every 64 by every KV head.
    Still,
}

/// What is timed.
#[derive(Debug)]
pub struct Settings {
    pub geometry: HeadGeometry,
    pub place: Place,
    pub contexts: Vec<usize>,
    pub batch: usize,
    /// How a state stores exact rows.
    pub rows: RowDtype,
    pub repetitions: usize,
    pub variants: Vec<Timed>,
    pub json: bool,
}

/// A variant and what is timed of it.
#[derive(Debug)]
pub struct Timed {
    pub name: &'static str,
    /// None: dense attention.
    pub hybrid: Option<Hybrid>,
    pub passes: Vec<Pass>,
}

impl AttentionBenchArgs {
    /// # Errors
    /// Nothing to time; heads, passes or rows that there are not; a device that is not there.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        something_to_time(&[self.state.batch])?;
        something_to_time(self.contexts.as_deref().unwrap_or_default())?;
        let variants = self.variants.iter().map(|&variant| self.timed(variant));
        let variants = variants.collect::<anyhow::Result<_>>()?;
        let geometry = self.geometry()?;
        let place = self.device.resolve()?;
        let on_cpu = place.device.is_cpu();
        if on_cpu && place.dtype != DType::F32 {
            return Err(user(
                format!("the operator computes in f32 on the CPU, not in {}", place.dtype.as_str()),
                "leave --compute-dtype out, or use --device cuda",
            ));
        }
        let usual = if on_cpu { [2048, 8192] } else { [8192, 131_072] };
        Ok(Settings {
            geometry,
            contexts: self.contexts.unwrap_or_else(|| usual.to_vec()),
            batch: self.state.batch,
            rows: self.state.cache.resolve(&place, RowDtype::Bf16)?.alone(),
            place,
            repetitions: self.repetitions,
            variants,
            json: self.output.json,
        })
    }

    fn timed(&self, variant: Variant) -> anyhow::Result<Timed> {
        let asked = |all: &[Pass]| self.passes.clone().unwrap_or_else(|| all.to_vec());
        match variant {
            Variant::Still => Ok(Timed {
                name: "still",
                hybrid: Some(Hybrid { chunk: CHUNK, budget: self.budget, cap: self.state.cap }),
                passes: asked(&Pass::ALL),
            }),
            Variant::Dense => {
                let passes = asked(&[Pass::Forward, Pass::Decode]);
                if passes.contains(&Pass::ForwardBackward) {
                    return Err(user(
                        "the variant `dense` has no pass `forward-backward`: the teacher's attention is not trained",
                        "leave the pass out of --passes, or `dense` out of --variants",
                    ));
                }
                Ok(Timed { name: "dense", hybrid: None, passes })
            }
        }
    }

    /// The heads that are asked for, or else those of the shape.
    fn geometry(&self) -> anyhow::Result<HeadGeometry> {
        let shape = shape_of(&self.shape)?.geometry();
        let geometry = HeadGeometry {
            num_heads: self.heads.unwrap_or(shape.num_heads),
            num_key_value_heads: self.kv_heads.unwrap_or(shape.num_key_value_heads),
            head_dim: self.head_dim.unwrap_or(shape.head_dim),
        };
        let HeadGeometry { num_heads, num_key_value_heads, head_dim } = geometry;
        if num_heads == 0 || num_key_value_heads == 0 || head_dim == 0 {
            return Err(user(
                "there are no heads to time",
                "give head counts and --head-dim above 0",
            ));
        }
        if num_heads % num_key_value_heads != 0 {
            return Err(user(
                format!(
                    "{num_heads} query heads cannot share {num_key_value_heads} key/value heads"
                ),
                "give --heads a multiple of --kv-heads",
            ));
        }
        Ok(geometry)
    }
}
