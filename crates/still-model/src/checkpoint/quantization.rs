//! `quantization_config` of a Hugging Face configuration: which 8-bit weights there are and how they are scaled.
//!
//! Weights are widened to f32 when they are read ([`super::dequantize`]). How activations or a KV cache are quantized while
//! such a model runs elsewhere is no part of its weights: here both keep their precision.

use safetensors::Dtype;

use crate::config::Table;
use crate::error::{ModelError, Result};

const KEY: &str = "quantization_config";
const HINT: &str = "supported: \"fp8\", and \"compressed-tensors\" in the formats float-quantized and int-quantized of 8 \
                    bits; give such a checkpoint, or the unquantized one";
const BLOCK: std::ops::RangeInclusive<usize> = 1..=1 << 16;

/// How the 8-bit weights of a checkpoint are scaled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Quantization {
    /// What 8-bit weights may be.
    pub elements: Vec<Element>,
    /// What one scale is for.
    pub strategies: Vec<Strategy>,
    /// What a scale's name may have after its matrix's.
    pub scale_suffixes: &'static [&'static str],
}

/// What a byte of a quantized matrix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    /// A float with a sign, 4 bits of exponent and 3 of mantissa; no infinities (`F8_E4M3`).
    E4m3,
    /// A signed integer (`I8`).
    I8,
}

impl Element {
    /// By the dtype that safetensors files name.
    fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F8_E4M3 => Some(Self::E4m3),
            Dtype::I8 => Some(Self::I8),
            _ => None,
        }
    }
}

/// The part of a matrix that shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strategy {
    /// All of it.
    Tensor,
    /// A row.
    Channel,
    /// A rectangle of so many rows and columns; those at the far ends may be smaller.
    Block([usize; 2]),
}

impl Quantization {
    /// From a model's configuration; `None` if it is not quantized.
    ///
    /// # Errors
    /// A kind of quantization that is not read, by name; a value of the wrong type.
    pub fn read(config: &Table<'_>) -> Result<Option<Self>> {
        // MLX, which has one key for itself.
        if config.value("quantization").is_some() {
            return Err(config.unsupported("quantization", HINT));
        }
        let old = config.table("compression_config")?;
        let Some(table) = config.table(KEY)?.or(old) else { return Ok(None) };
        let Some(method) = table.text("quant_method")? else {
            let bits = ["load_in_4bit", "load_in_8bit"];
            let name = bits.iter().any(|key| table.mentions(key)).then_some("bitsandbytes");
            return Err(match name {
                Some(name) => unsupported(&format!("quantization by {name} (\"{KEY}\")")),
                None => table.missing("quant_method"),
            });
        };
        match method {
            "fp8" => Self::read_fp8(&table).map(Some),
            "compressed-tensors" => Self::read_compressed(&table).map(Some),
            _ => Err(table.unsupported("quant_method", HINT)),
        }
    }

    /// DeepSeek's and Qwen's: blocks, or one scale for a matrix.
    fn read_fp8(table: &Table<'_>) -> Result<Self> {
        if table.text("fmt")?.is_some_and(|format| format != "e4m3") {
            return Err(table.unsupported("fmt", HINT));
        }
        let block = table.sizes("weight_block_size", BLOCK)?;
        let strategies = match block.as_deref() {
            None => vec![Strategy::Tensor, Strategy::Channel],
            Some(&[rows, columns]) => vec![Strategy::Block([rows, columns])],
            Some(_) => return Err(table.wrong("weight_block_size", "two whole numbers")),
        };
        // "Inverse" of what a weight was multiplied by when it was quantized: what it is multiplied by now.
        let scale_suffixes = &["_scale_inv", "_scale"];
        Ok(Self { elements: vec![Element::E4m3], strategies, scale_suffixes })
    }

    /// llm-compressor's.
    fn read_compressed(table: &Table<'_>) -> Result<Self> {
        let elements = elements_of(table, "format")?;
        for key in ["transform_config", "sparsity_config"] {
            refuse_change(table, key)?;
        }
        let mut read = Self { elements, strategies: Vec::new(), scale_suffixes: &["_scale"] };
        if let Some(groups) = table.table("config_groups")? {
            for name in groups.keys() {
                let Some(group) = groups.table(name)? else { continue };
                if group.text("format")?.is_some() {
                    elements_of(&group, "format")?;
                }
                match group.table("weights")? {
                    Some(weights) => read.strategies.push(strategy(&weights)?),
                    None => return Err(group.missing("weights")),
                }
            }
        }
        if read.strategies.is_empty() {
            read.strategies = vec![Strategy::Tensor, Strategy::Channel];
        }
        Ok(read)
    }

    /// What a stored dtype is, if it is quantized here.
    pub fn element(&self, dtype: Dtype) -> Option<Element> {
        Element::of(dtype).filter(|element| self.elements.contains(element))
    }
}

/// What weights may be, by the name of a format.
fn elements_of(table: &Table<'_>, key: &str) -> Result<Vec<Element>> {
    match table.text(key)? {
        Some("float-quantized") => Ok(vec![Element::E4m3]),
        Some("int-quantized") => Ok(vec![Element::I8]),
        Some("naive-quantized") => Ok(vec![Element::E4m3, Element::I8]),
        Some(_) => Err(table.unsupported(key, HINT)),
        None => Err(table.missing(key)),
    }
}

/// What the weights of one group share a scale by.
fn strategy(weights: &Table<'_>) -> Result<Strategy> {
    if weights.size("num_bits", 1..=64)?.is_some_and(|bits| bits != 8) {
        return Err(weights.unsupported("num_bits", HINT));
    }
    if !matches!(weights.text("type")?, None | Some("float" | "int")) {
        return Err(weights.unsupported("type", HINT));
    }
    if weights.flag("symmetric")? == Some(false) {
        return Err(weights.unsupported("symmetric", "weights with zero points are not read"));
    }
    if weights.flag("dynamic")? == Some(true) {
        return Err(weights.unsupported("dynamic", HINT));
    }
    match weights.text("strategy")? {
        Some("tensor") => Ok(Strategy::Tensor),
        Some("channel") => Ok(Strategy::Channel),
        Some("block") => match weights.sizes("block_structure", BLOCK)?.as_deref() {
            Some(&[rows, columns]) => Ok(Strategy::Block([rows, columns])),
            _ => Err(weights.wrong("block_structure", "two whole numbers")),
        },
        Some(_) => Err(weights.unsupported("strategy", "supported: tensor, channel, block")),
        None => Err(weights.missing("strategy")),
    }
}

/// An error if weights were also rotated or thinned out.
fn refuse_change(table: &Table<'_>, key: &str) -> Result<()> {
    let Some(change) = table.table(key)? else { return Ok(()) };
    let plain = change.keys().next().is_none()
        || (key == "sparsity_config" && matches!(change.text("format")?, None | Some("dense")));
    if plain {
        return Ok(());
    }
    Err(table.unsupported(key, HINT))
}

fn unsupported(what: &str) -> ModelError {
    ModelError::Unsupported { what: what.to_owned(), found_in: None, hint: HINT.into() }
}
