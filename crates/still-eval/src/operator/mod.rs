//! Times the attention operator alone: whole sequences, their gradients, and one token after a prefix.
//!
//! [`Counted`] defines its operations and bytes. A repetition is as many calls as last 10 ms, at most 64, and the host waits for
//! the device before and after it. For decoding, a repetition is 64 tokens, one of which retires a chunk. Each token goes through
//! several equal states, so that no state stays in a CPU's or GPU's cache. On CUDA these are one graph, launched once a token.

mod ceilings;
mod counts;
#[cfg(feature = "cuda")]
mod cuda;
mod decode;
mod inputs;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use still_attention::{
    AttentionError, HeadGeometry, HybridConfig, HybridWeights, RowDtype, StillConfig,
    attention_forward, dense_attention, hybrid_attention,
};
use still_compute::{Gradients, Spans};
use still_model::ModelError;

use crate::error::{EvalError, Result};
use crate::timing::{Times, time};
use decode::{Decoded, steps};

pub use ceilings::Ceilings;
pub use counts::{Count, Counted, Hybrid};

/// Tokens of a repetition of decoding: one of them retires a chunk.
const TOKENS: usize = 64;

/// The pass to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pass {
    /// Whole sequences, nothing to train: routing, maps and states included.
    Forward,
    /// The same and the gradients of Q, K, V and everything that a student learns here.
    ForwardBackward,
    /// One token of each sequence after a prefix.
    Decode,
}

impl Pass {
    /// All, in the order of a table.
    pub const ALL: [Self; 3] = [Self::Forward, Self::ForwardBackward, Self::Decode];

    /// As in results and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::ForwardBackward => "forward-backward",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Pass {
    type Err = EvalError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|pass| pass.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            EvalError::Argument(format!("no pass is called {name:?}: use one of {names}"))
        })
    }
}

/// What to time.
#[derive(Clone, Copy, Debug)]
pub struct OperatorOptions {
    /// Heads.
    pub geometry: HeadGeometry,
    /// Sequences.
    pub batch: usize,
    /// The attention; `None` for dense attention.
    pub hybrid: Option<Hybrid>,
    /// How a state stores exact rows.
    pub rows: RowDtype,
    /// Repetitions that are timed.
    pub repetitions: usize,
}

/// One measured pass; times are of one call, which for decoding is one token of every sequence through one state.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "docs/bench.md describes the keys")]
pub struct OperatorPoint {
    pub pass: Pass,
    pub context: usize,
    pub repetitions: usize,
    /// Calls in each repetition.
    pub calls: usize,
    pub median_ms: f64,
    pub p10_ms: f64,
    pub p90_ms: f64,
    /// As [`Counted`] counts; of decoding the mean of the steps that were timed.
    pub flop: f64,
    pub bytes: f64,
    pub tflop_per_s: f64,
    pub gb_per_s: f64,
    /// Of [`Ceilings::product_tflop_per_s`].
    pub share_of_product: f64,
    /// Of [`Ceilings::copy_gb_per_s`].
    pub share_of_copy: f64,
}

/// A device and its ceilings.
#[derive(Clone, Debug)]
pub struct OperatorBench {
    device: Device,
    dtype: DType,
    /// Measured when it was made.
    pub ceilings: Ceilings,
}

/// The timed calls.
struct Timed {
    times: Times,
    /// Copies of the state, each of which a call goes through.
    copies: usize,
    /// Decode steps that `count` is of; 1 of a whole pass.
    steps: usize,
    count: Count,
}

impl OperatorBench {
    /// Measures the ceilings of a device in `dtype`: f32 on the CPU, f32 or bf16 on CUDA.
    ///
    /// # Errors
    /// Another dtype; an error of the device.
    pub fn new(device: &Device, dtype: DType) -> Result<Self> {
        if device.is_cpu() && dtype != DType::F32 {
            return Err(EvalError::Argument(format!(
                "the operator computes in f32 on the CPU, not in {}",
                dtype.as_str()
            )));
        }
        let ceilings = ceilings::ceilings(device, dtype)?;
        Ok(Self { device: device.clone(), dtype, ceilings })
    }

    /// Times one pass at `context` tokens.
    ///
    /// # Errors
    /// Nothing to time; heads, budgets or a pass that there are no kernels for.
    pub fn time(
        &self,
        options: &OperatorOptions,
        pass: Pass,
        context: usize,
    ) -> Result<OperatorPoint> {
        let OperatorOptions { geometry, batch, hybrid, repetitions, .. } = *options;
        if batch == 0 || context == 0 || repetitions == 0 {
            return Err(EvalError::Argument(
                "there must be sequences, tokens and repetitions to time".into(),
            ));
        }
        let config = hybrid.map(|hybrid| config(geometry, hybrid)).transpose();
        let config = config.map_err(ModelError::from)?;
        let weights = inputs::weights(geometry, &self.device)?;
        let layer = config.as_ref().map(|config| (config, &weights));
        let Timed { times, copies, steps, count } = self.timed(options, pass, context, layer)?;
        let [median_ms, p10_ms, p90_ms] =
            [times.median_ms, times.quantile_ms(0.1), times.quantile_ms(0.9)]
                .map(|ms| ms / copies as f64);
        let [flop, bytes] = [count.flop, count.bytes].map(|of| of as f64 / steps as f64);
        let (tflop_per_s, gb_per_s) = (flop / (1e9 * median_ms), bytes / (1e6 * median_ms));
        Ok(OperatorPoint {
            pass,
            context,
            repetitions,
            calls: times.calls * copies,
            median_ms,
            p10_ms,
            p90_ms,
            flop,
            bytes,
            tflop_per_s,
            gb_per_s,
            share_of_product: tflop_per_s / self.ceilings.product_tflop_per_s,
            share_of_copy: gb_per_s / self.ceilings.copy_gb_per_s,
        })
    }

    /// The pass `repetitions` times, and what it computes and reads.
    fn timed(
        &self,
        options: &OperatorOptions,
        pass: Pass,
        context: usize,
        layer: Option<(&HybridConfig, &HybridWeights)>,
    ) -> Result<Timed> {
        let OperatorOptions { geometry, batch, repetitions, .. } = *options;
        let prefix = inputs::rows(geometry, batch, context, &self.device, self.dtype)?;
        let counted = self.counted(options);
        let (mut copies, mut steps_timed) = (1, 1);
        let (times, count) = match (pass, layer) {
            (Pass::Forward, Some((config, weights))) => {
                let [q, k, v] = &prefix;
                let times = time::<ModelError>(&self.device, repetitions, None, || {
                    hybrid_attention(q, k, v, weights, None, config, None)?;
                    Ok(())
                })?;
                (times, counted.forward(context))
            }
            (Pass::Forward, None) => {
                let [q, k, v] = &prefix;
                let times = time::<ModelError>(&self.device, repetitions, None, || {
                    dense_attention(q, k, v, None)?;
                    Ok(())
                })?;
                (times, counted.forward(context))
            }
            (Pass::ForwardBackward, Some((config, weights))) => {
                let rows = prefix.each_ref();
                let d_out = prefix[0].ones_like()?;
                let spans = Arc::new(Spans::new(weights.tensors()));
                let times = time::<ModelError>(&self.device, repetitions, None, || {
                    let (_, saved) = attention_forward(rows, None, weights, config, None, true)?;
                    saved.backward(&d_out, &mut Gradients::new(&spans)?)?;
                    Ok(())
                })?;
                (times, counted.forward_backward(context))
            }
            (Pass::ForwardBackward, None) => {
                return Err(EvalError::Argument(
                    "dense attention has no backward pass here: it is the teacher's".into(),
                ));
            }
            (Pass::Decode, _) => {
                // One repetition more warms up.
                let all = (repetitions + 1) * TOKENS;
                let token = inputs::rows(geometry, batch, 1, &self.device, self.dtype)?;
                let rows = options.rows;
                let mut steps =
                    steps(Decoded { geometry, hybrid: layer, rows, prefix, token, steps: all })?;
                let times = time(&self.device, repetitions, Some(TOKENS), &mut steps.step)?;
                (copies, steps_timed) = (steps.copies, repetitions * TOKENS);
                (times, counted.decode(context + TOKENS..context + all))
            }
        };
        Ok(Timed { times, copies, steps: steps_timed, count })
    }

    fn counted(&self, options: &OperatorOptions) -> Counted {
        let OperatorOptions { geometry, batch, hybrid, rows, .. } = *options;
        let value_bytes = self.dtype.size_in_bytes();
        let row_bytes = rows.row_bytes(geometry.head_dim);
        Counted { geometry, batch, value_bytes, row_bytes, hybrid }
    }
}

/// Our defaults, with one budget.
fn config(
    geometry: HeadGeometry,
    hybrid: Hybrid,
) -> std::result::Result<HybridConfig, AttentionError> {
    let uniform = StillConfig::uniform(1, geometry, hybrid.chunk, hybrid.budget);
    let config = StillConfig { cap: hybrid.cap, ..uniform }.layer(0)?;
    config.validate(geometry)?;
    Ok(config)
}
