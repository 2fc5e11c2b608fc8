//! Tensors by name, whatever file they come from.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use still_quant::{Format, PackedMatrix};

use super::{gguf, names};
use crate::config::{Architecture, ModelConfig};
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::seal::{self, Kind};

/// A readable set of tensors under Hugging Face's names.
pub struct Weights {
    /// Later layers are looked at first.
    sources: Vec<Source>,
}

enum Source {
    Safetensors { files: MmapedSafetensors, path: PathBuf },
    Gguf(Box<GgufSource>),
    Memory(HashMap<String, Tensor>),
}

struct GgufSource {
    content: gguf_file::Content,
    reader: Mutex<BufReader<File>>,
    path: PathBuf,
    layout: GgufLayout,
}

/// How tensors are named and ordered in a GGUF file.
pub(super) enum GgufLayout {
    /// As llama.cpp has them.
    LlamaCpp(ModelConfig),
    /// As Hugging Face has them: in students' own files.
    HuggingFace,
}

impl GgufLayout {
    /// The file's name of a tensor.
    fn stored_name(&self, name: &str) -> Option<String> {
        match self {
            Self::LlamaCpp(_) => names::to_gguf(name),
            Self::HuggingFace => Some(name.to_owned()),
        }
    }

    /// The tensor that has a name in the file.
    fn name(&self, stored: &str) -> Option<String> {
        match self {
            Self::LlamaCpp(_) => names::from_gguf(stored),
            Self::HuggingFace => Some(stored.to_owned()),
        }
    }

    /// Heads of a matrix whose rows llama.cpp stores interleaved: q and k of the Llama architecture.
    fn permuted_heads(&self, name: &str) -> Option<usize> {
        let Self::LlamaCpp(config) = self else { return None };
        if config.architecture != Architecture::Llama {
            return None;
        }
        match name.rsplit_once("self_attn.")?.1 {
            "q_proj.weight" => Some(config.num_attention_heads),
            "k_proj.weight" => Some(config.num_key_value_heads),
            _ => None,
        }
    }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({} sources)", self.sources.len())
    }
}

impl Weights {
    /// Memory-maps safetensors files that together hold a model.
    ///
    /// # Errors
    /// A missing, truncated or otherwise broken file, named.
    pub fn from_safetensors(paths: &[PathBuf]) -> Result<Self> {
        for path in paths {
            check_safetensors(path)?;
        }
        // SAFETY: the maps are read-only; as with any mapped file, another process must not truncate
        // it while it is in use.
        let files = unsafe { MmapedSafetensors::multi(paths) }?;
        let path = paths.first().cloned().unwrap_or_default();
        Ok(Self { sources: vec![Source::Safetensors { files, path }] })
    }

    /// An error if a safetensors file has no digest. (One that it has is checked wherever the file is opened.)
    pub(super) fn require_digest(path: &Path) -> Result<()> {
        let map = map(path)?;
        if seal::is_sealed(&map, Kind::Safetensors) {
            return Ok(());
        }
        Err(seal::without_digest(path))
    }

    /// Reads a GGUF file's directory; tensors are dequantized when asked for.
    pub(super) fn from_gguf(
        path: &Path,
        content: gguf_file::Content,
        layout: GgufLayout,
    ) -> Result<Self> {
        let reader = Mutex::new(BufReader::new(File::open(path).map_err(ModelError::read(path))?));
        let source = GgufSource { content, reader, path: path.to_path_buf(), layout };
        Ok(Self { sources: vec![Source::Gguf(Box::new(source))] })
    }

    /// Tensors already in memory.
    pub fn from_tensors(tensors: HashMap<String, Tensor>) -> Self {
        Self { sources: vec![Source::Memory(tensors)] }
    }

    /// These weights, with `top`'s taking precedence.
    #[must_use]
    pub fn overlaid(mut self, top: Self) -> Self {
        self.sources.extend(top.sources);
        self
    }

    /// Names of every tensor.
    pub fn names(&self) -> Vec<String> {
        let mut all: Vec<String> = self
            .sources
            .iter()
            .flat_map(|source| match source {
                Source::Safetensors { files, .. } => {
                    files.tensors().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
                }
                Source::Gguf(source) => source
                    .content
                    .tensor_infos
                    .keys()
                    .filter_map(|name| source.layout.name(name))
                    .collect(),
                Source::Memory(tensors) => tensors.keys().cloned().collect(),
            })
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// A tensor's shape, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.sources.iter().rev().find_map(|source| source.shape(name))
    }

    /// A tensor of a known shape.
    ///
    /// # Errors
    /// If it is missing or of another shape.
    pub fn get(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.get_optional(name, shape, dtype, device)?
            .ok_or_else(|| self.broken(format!("tensor {name} is missing")))
    }

    /// A tensor that may be absent.
    ///
    /// # Errors
    /// If it is of another shape or unreadable.
    pub fn get_optional(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Option<Tensor>> {
        for source in self.sources.iter().rev() {
            let Some(tensor) = source.load(name, device)? else { continue };
            if tensor.dims() != shape {
                return Err(self.broken(format!(
                    "tensor {name} has shape {:?}, the configuration needs {shape:?}",
                    tensor.dims()
                )));
            }
            return Ok(Some(tensor.to_dtype(dtype)?.contiguous()?));
        }
        Ok(None)
    }

    /// A matrix of a known shape on the CPU, as the file has it where products can use that; otherwise in f32.
    ///
    /// # Errors
    /// If it is missing or of another shape.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight> {
        for source in self.sources.iter().rev() {
            match source.packed(name)? {
                Some(matrix) if [matrix.rows(), matrix.columns()] == shape => {
                    return Ok(Weight::Packed(matrix));
                }
                Some(matrix) => {
                    return Err(self.broken(format!(
                        "tensor {name} has shape {:?}, the configuration needs {shape:?}",
                        [matrix.rows(), matrix.columns()]
                    )));
                }
                None if source.has(name) => break,
                None => {}
            }
        }
        Ok(Weight::Dense(self.get(name, &shape, DType::F32, &Device::Cpu)?))
    }

    fn broken(&self, reason: String) -> ModelError {
        let path = self.sources.iter().find_map(|source| match source {
            Source::Safetensors { path, .. } => Some(path.clone()),
            Source::Gguf(source) => Some(source.path.clone()),
            Source::Memory(_) => None,
        });
        ModelError::Corrupt {
            path: path.unwrap_or_else(|| "model".into()),
            reason,
            hint: "the weights do not belong to this configuration".into(),
        }
    }
}

impl Source {
    fn has(&self, name: &str) -> bool {
        match self {
            Self::Memory(tensors) => tensors.contains_key(name),
            Self::Safetensors { files, .. } => files.get(name).is_ok(),
            Self::Gguf(source) => source
                .layout
                .stored_name(name)
                .is_some_and(|name| source.content.tensor_infos.contains_key(&name)),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::Memory(tensors) => Some(tensors.get(name)?.dims().to_vec()),
            Self::Safetensors { files, .. } => Some(files.get(name).ok()?.shape().to_vec()),
            Self::Gguf(source) => {
                let stored = source.layout.stored_name(name)?;
                Some(source.content.tensor_infos.get(&stored)?.shape.dims().to_vec())
            }
        }
    }

    /// A matrix in the file's own form; `None` if it is not there, or in a form that has no product.
    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>> {
        match self {
            Self::Memory(_) => Ok(None),
            Self::Safetensors { files, .. } => {
                let Ok(view) = files.get(name) else { return Ok(None) };
                let format = match view.dtype() {
                    safetensors::Dtype::BF16 => Format::Bf16,
                    safetensors::Dtype::F16 => Format::F16,
                    _ => return Ok(None),
                };
                let &[rows, columns] = view.shape() else { return Ok(None) };
                Ok(PackedMatrix::new(format, rows, columns, view.data()).ok())
            }
            Self::Gguf(source) => source.packed(name),
        }
    }

    fn load(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        match self {
            Self::Memory(tensors) => {
                Ok(tensors.get(name).map(|t| t.to_device(device)).transpose()?)
            }
            Self::Safetensors { files, .. } => match files.get(name) {
                Ok(_) => Ok(Some(files.load(name, device)?)),
                Err(_) => Ok(None),
            },
            Self::Gguf(source) => source.load(name, device),
        }
    }
}

impl GgufSource {
    fn read(&self, name: &str) -> Result<Option<QTensor>> {
        let Some(name) = self.layout.stored_name(name) else { return Ok(None) };
        if !self.content.tensor_infos.contains_key(&name) {
            return Ok(None);
        }
        let mut reader = self.reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(Some(self.content.tensor(&mut *reader, &name, &Device::Cpu)?))
    }

    fn load(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        let Some(tensor) = self.read(name)? else { return Ok(None) };
        let tensor = tensor.dequantize(device)?;
        Ok(Some(match self.layout.permuted_heads(name) {
            Some(heads) => {
                let order: Vec<u32> =
                    gguf::row_order(tensor.dim(0)?, heads).map(|row| row as u32).collect();
                tensor.index_select(&Tensor::new(order, device)?, 0)?
            }
            None => tensor,
        }))
    }

    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>> {
        let Some(tensor) = self.read(name)? else { return Ok(None) };
        let format = match tensor.dtype() {
            GgmlDType::BF16 => Format::Bf16,
            GgmlDType::F16 => Format::F16,
            GgmlDType::Q4_0 => Format::Q4_0,
            GgmlDType::Q4_1 => Format::Q4_1,
            GgmlDType::Q8_0 => Format::Q8_0,
            GgmlDType::Q4K => Format::Q4K,
            GgmlDType::Q6K => Format::Q6K,
            _ => return Ok(None),
        };
        let &[rows, columns] = tensor.shape().dims() else { return Ok(None) };
        let stored = tensor.data()?;
        let bytes = match self.layout.permuted_heads(name) {
            Some(heads) => {
                let size = stored.len() / rows;
                gguf::row_order(rows, heads)
                    .flat_map(|row| &stored[row * size..(row + 1) * size])
                    .copied()
                    .collect()
            }
            None => stored,
        };
        Ok(PackedMatrix::new(format, rows, columns, &bytes).ok())
    }
}

/// An error unless the file's header is sound and its data complete, and what its digest says, if it has one.
fn check_safetensors(path: &Path) -> Result<()> {
    let map = map(path)?;
    seal::expect(path, &map, Kind::Safetensors, false)?;
    safetensors::SafeTensors::deserialize(&map)
        .map(drop)
        .map_err(|error| ModelError::corrupt(path, format!("not valid safetensors: {error}")))
}

fn map(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).map_err(ModelError::read(path))?;
    let length = file.metadata().map_err(ModelError::read(path))?.len();
    if length < 8 {
        return Err(ModelError::corrupt(
            path,
            format!("{length} bytes are too few for safetensors"),
        ));
    }
    // SAFETY: as in `from_safetensors`.
    unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::read(path))
}
