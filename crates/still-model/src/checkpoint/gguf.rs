//! GGUF files: a bounds-checked look before the reading, the configuration, the rows' order.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};

use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::error::{ModelError, Result};

/// Reads a GGUF file's directory.
///
/// # Errors
/// A file that is not GGUF, damaged or truncated.
pub fn open(path: &Path) -> Result<Content> {
    let file = File::open(path).map_err(ModelError::read(path))?;
    // SAFETY: the map is read-only and dropped before this function returns.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::read(path))?;
    let end = scan(&map).ok_or_else(|| {
        let reason = if map.starts_with(b"GGUF") {
            "the GGUF header is damaged or cut off"
        } else {
            "not a GGUF file"
        };
        ModelError::corrupt(path, reason)
    })?;
    let mut reader = BufReader::new(&file);
    let content = Content::read(&mut reader)
        .map_err(|error| ModelError::corrupt(path, format!("unreadable GGUF: {error}")))?;
    debug_assert!(end as u64 <= content.tensor_data_offset);
    for (name, info) in &content.tensor_infos {
        let blocks = info.shape.elem_count().div_ceil(info.ggml_dtype.block_size());
        let size = blocks * info.ggml_dtype.type_size();
        let last =
            content.tensor_data_offset.saturating_add(info.offset).saturating_add(size as u64);
        if last > map.len() as u64 {
            return Err(ModelError::corrupt(
                path,
                format!("truncated: tensor {name} ends at byte {last} of {}", map.len()),
            ));
        }
    }
    Ok(content)
}

/// Walks the header without trusting a length in it; returns where it ends.
///
/// candle's reader allocates what the file claims to need, so that a damaged length could exhaust memory.
fn scan(bytes: &[u8]) -> Option<usize> {
    let mut at = Cursor { bytes, at: 0 };
    if at.take(4)? != b"GGUF" || !(1..=3).contains(&at.u32()?) {
        return None;
    }
    let wide = bytes[4] != 1;
    let (tensors, entries) = (at.count(wide)?, at.count(wide)?);
    for _ in 0..entries {
        at.string(wide)?;
        let kind = at.u32()?;
        at.value(kind, wide, 0)?;
    }
    for _ in 0..tensors {
        at.string(wide)?;
        let dimensions = at.u32()?;
        if dimensions > 8 {
            return None;
        }
        let mut elements = 1_u64;
        for _ in 0..dimensions {
            elements = elements.checked_mul(at.count(wide)? as u64)?;
        }
        // No type stores less than one bit a value.
        if elements / 8 > bytes.len() as u64 {
            return None;
        }
        at.u32()?;
        at.take(8)?;
    }
    Some(at.at)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let slice = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(slice)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn count(&mut self, wide: bool) -> Option<usize> {
        if !wide {
            return Some(self.u32()? as usize);
        }
        usize::try_from(u64::from_le_bytes(self.take(8)?.try_into().ok()?)).ok()
    }

    fn string(&mut self, wide: bool) -> Option<()> {
        let length = self.count(wide)?;
        self.take(length).map(drop)
    }

    fn value(&mut self, kind: u32, wide: bool, depth: usize) -> Option<()> {
        match kind {
            0 | 1 | 7 => self.take(1).map(drop),
            2 | 3 => self.take(2).map(drop),
            4..=6 => self.take(4).map(drop),
            10..=12 => self.take(8).map(drop),
            8 => self.string(wide),
            9 if depth < 4 => {
                let kind = self.u32()?;
                let length = self.count(wide)?;
                (length <= self.bytes.len()).then_some(())?;
                (0..length).try_for_each(|_| self.value(kind, wide, depth + 1))
            }
            _ => None,
        }
    }
}

/// The model's hyper-parameters.
///
/// # Errors
/// An unsupported architecture (named), a missing or contradictory value.
pub fn config(path: &Path, content: &Content) -> Result<ModelConfig> {
    let text = |key: &str| content.metadata.get(key).and_then(|v| v.to_string().ok().cloned());
    let name = text("general.architecture")
        .ok_or_else(|| ModelError::corrupt(path, "general.architecture is missing"))?;
    let architecture = Architecture::from_gguf(&name).map_err(|error| match error {
        ModelError::Unsupported { what, hint, .. } => {
            ModelError::Unsupported { what, hint, found_in: Some(path.to_path_buf()) }
        }
        other => other,
    })?;
    let number = |key: &str| {
        content
            .metadata
            .get(&format!("{name}.{key}"))
            .or_else(|| content.metadata.get(key))
            .and_then(as_f64)
    };
    let required = |key: &str| {
        number(key)
            .map(|n| n as usize)
            .ok_or_else(|| ModelError::corrupt(path, format!("{name}.{key} is missing")))
    };
    let hidden_size = required("embedding_length")?;
    let num_attention_heads = required("attention.head_count")?;
    let embedding = content
        .tensor_infos
        .get("token_embd.weight")
        .ok_or_else(|| ModelError::corrupt(path, "tensor token_embd.weight is missing"))?;
    let rope_scaling = match text(&format!("{name}.rope.scaling.type")).as_deref() {
        None | Some("none") => None,
        Some("linear") => {
            Some(RopeScaling::Linear { factor: number("rope.scaling.factor").unwrap_or(1.0) })
        }
        Some(other) => {
            return Err(ModelError::Unsupported {
                what: format!("rope scaling \"{other}\""),
                found_in: Some(path.to_path_buf()),
                hint: "supported in GGUF: none, linear; use the safetensors checkpoint".into(),
            });
        }
    };
    if content.tensor_infos.contains_key("rope_freqs.weight") {
        return Err(ModelError::Unsupported {
            what: "RoPE scaling by a rope_freqs tensor (Llama 3.1 in GGUF)".into(),
            found_in: Some(path.to_path_buf()),
            hint: "use the safetensors checkpoint of this model".into(),
        });
    }
    let context = number("context_length").unwrap_or(2048.0);
    if let Some(window) = number("attention.sliding_window").filter(|&n| n > 0.0 && n < context) {
        return Err(ModelError::Unsupported {
            what: format!(
                "attention in a sliding window of {window} tokens ({name}.attention.sliding_window), shorter than \
                 the context of {context},"
            ),
            found_in: Some(path.to_path_buf()),
            hint: "linearizing replaces attention to the whole context, which this model does not have: use a \
                   version without a window"
                .into(),
        });
    }
    let token = |key: &str| number(&format!("tokenizer.ggml.{key}_token_id")).map(|id| id as u32);
    let config = ModelConfig {
        architecture,
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        num_hidden_layers: required("block_count")?,
        num_attention_heads,
        num_key_value_heads: number("attention.head_count_kv")
            .map_or(num_attention_heads, |n| n as usize),
        head_dim: number("attention.key_length")
            .or_else(|| number("rope.dimension_count"))
            .map_or(hidden_size / num_attention_heads.max(1), |n| n as usize),
        vocab_size: embedding.shape.dims().first().copied().unwrap_or(0),
        rms_norm_eps: number("attention.layer_norm_rms_epsilon").map_or(1e-5, round_f32),
        rope_theta: number("rope.freq_base").unwrap_or(10_000.0),
        rope_scaling,
        max_position_embeddings: context as usize,
        tie_word_embeddings: !content.tensor_infos.contains_key("output.weight"),
        attention_bias: content.tensor_infos.contains_key("blk.0.attn_q.bias"),
        bos_token_id: token("bos"),
        eos_token_ids: crate::tokenizer::end_of_generation(content),
    };
    config.validate()?;
    Ok(config)
}

/// The shortest decimal that is this f32: GGUF stores 1e-5 as 9.99999974e-6.
fn round_f32(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}

fn as_f64(value: &Value) -> Option<f64> {
    match value {
        Value::U8(x) => Some(f64::from(*x)),
        Value::I8(x) => Some(f64::from(*x)),
        Value::U16(x) => Some(f64::from(*x)),
        Value::I16(x) => Some(f64::from(*x)),
        Value::U32(x) => Some(f64::from(*x)),
        Value::I32(x) => Some(f64::from(*x)),
        Value::U64(x) => Some(*x as f64),
        Value::I64(x) => Some(*x as f64),
        Value::F32(x) => Some(f64::from(*x)),
        Value::F64(x) => Some(*x),
        Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
    }
}

/// Undoes the interleaved order in which Llama GGUF files store q and k rows: the stored row of each row in half
/// rotation's order.
pub fn row_order(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let half = rows / heads / 2;
    (0..rows).map(move |row| {
        let (head, pair, channel) = (row / (2 * half), row / half % 2, row % half);
        (head * half + channel) * 2 + pair
    })
}
