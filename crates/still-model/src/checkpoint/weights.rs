//! Tensors by name, whatever file they come from.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use still_quant::{Format, PackedMatrix};

use super::dequantize::dequantize;
use super::gguf;
use super::names::{self, StoredRows};
use super::quantization::Quantization;
use super::safetensors_file::{SafetensorsFiles, Stored, map};
use crate::config::ModelConfig;
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::seal::{self, Kind};

const UNLIKE: &str = "the weights do not belong to this configuration";

/// A readable set of tensors under Hugging Face's names.
pub struct Weights {
    /// Later layers are looked at first.
    pub(super) sources: Vec<Source>,
    /// Names of the tensors that were asked for and found.
    read: Mutex<BTreeSet<String>>,
    /// Where tensors are that files may have otherwise than by their own names.
    stored: Option<StoredRows>,
}

pub(super) enum Source {
    Safetensors { files: SafetensorsFiles, quantization: Option<Quantization> },
    Gguf(Box<GgufSource>),
    Memory(HashMap<String, Tensor>),
    Packed(HashMap<String, PackedMatrix>),
}

pub(super) struct GgufSource {
    pub(super) content: gguf_file::Content,
    reader: Mutex<BufReader<File>>,
    pub(super) path: PathBuf,
    pub(super) layout: GgufLayout,
}

/// How tensors are named and ordered in a GGUF file.
pub(super) enum GgufLayout {
    /// As llama.cpp has them.
    LlamaCpp(Box<ModelConfig>),
    /// As Hugging Face has them: in students' own files.
    HuggingFace,
}

impl GgufLayout {
    /// The file's name of a tensor.
    fn stored_name(&self, name: &str) -> Option<String> {
        match self {
            Self::LlamaCpp(config) => names::to_gguf(config.architecture, name),
            Self::HuggingFace => Some(name.to_owned()),
        }
    }

    /// The tensor that has a name in the file.
    pub(super) fn name(&self, stored: &str) -> Option<String> {
        match self {
            Self::LlamaCpp(config) => names::from_gguf(config.architecture, stored),
            Self::HuggingFace => Some(stored.to_owned()),
        }
    }

    /// What a norm's weight in the file has been added to it; 0 of all other tensors.
    fn norm_offset(&self, name: &str) -> f64 {
        match self {
            Self::LlamaCpp(config) if name.ends_with("norm.weight") => {
                config.architecture.family().norm_offset
            }
            _ => 0.0,
        }
    }

    /// Heads of a matrix, or of a bias, whose rows llama.cpp stores interleaved: q and k of some families.
    fn permuted_heads(&self, name: &str) -> Option<usize> {
        let Self::LlamaCpp(config) = self else { return None };
        if !config.architecture.family().interleaved_in_gguf {
            return None;
        }
        match name.rsplit_once("self_attn.")?.1 {
            "q_proj.weight" | "q_proj.bias" => Some(config.num_attention_heads),
            "k_proj.weight" | "k_proj.bias" => Some(config.num_key_value_heads),
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
    /// Memory-maps safetensors files that together hold a model, none of it quantized.
    ///
    /// # Errors
    /// A missing, truncated or otherwise broken file, named.
    pub fn from_safetensors(paths: &[PathBuf]) -> Result<Self> {
        Self::from_quantized_safetensors(paths, None)
    }

    /// [`Weights::from_safetensors`] with 8-bit matrices, which are widened to f32 when they are read.
    ///
    /// # Errors
    /// Also files without such matrices.
    pub(super) fn from_quantized_safetensors(
        paths: &[PathBuf],
        quantization: Option<Quantization>,
    ) -> Result<Self> {
        let files = SafetensorsFiles::open(paths)?;
        if let Some(quantization) = &quantization
            && !files.tensors().any(|(_, stored)| quantization.element(stored.dtype).is_some())
        {
            return Err(ModelError::Corrupt {
                path: files.path().to_path_buf(),
                reason: "holds no 8-bit weights, but config.json has a quantization_config".into(),
                hint:
                    "if the weights were widened, remove quantization_config; else fetch them again"
                        .into(),
            });
        }
        Ok(Self::new(Source::Safetensors { files, quantization }))
    }

    fn new(source: Source) -> Self {
        Self { sources: vec![source], read: Mutex::default(), stored: None }
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
        let config = match &layout {
            GgufLayout::LlamaCpp(config) => Some(config.clone()),
            GgufLayout::HuggingFace => None,
        };
        let source = GgufSource { content, reader, path: path.to_path_buf(), layout };
        let weights = Self::new(Source::Gguf(Box::new(source)));
        Ok(match config {
            Some(config) => weights.of_model(&config),
            None => weights,
        })
    }

    /// Tensors already in memory.
    pub fn from_tensors(tensors: HashMap<String, Tensor>) -> Self {
        Self::new(Source::Memory(tensors))
    }

    /// Packed matrices already in memory.
    pub(crate) fn from_packed(matrices: HashMap<String, PackedMatrix>) -> Self {
        Self::new(Source::Packed(matrices))
    }

    /// Finds the tensors of a model that its family's files may have otherwise than by their own names.
    #[must_use]
    pub(super) fn of_model(self, config: &ModelConfig) -> Self {
        Self { stored: Some(StoredRows::of(config)), ..self }
    }

    /// The tensor of `source` that has another one's rows, its rows in all, and which of them.
    fn stored(&self, source: &Source, name: &str) -> Option<(String, usize, Range<usize>)> {
        if source.shape(name).is_some() {
            return None;
        }
        let found = self.stored.as_ref()?.find(name)?;
        source.shape(&found.0).is_some().then_some(found)
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
                    files.tensors().map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
                }
                Source::Gguf(source) => source
                    .content
                    .tensor_infos
                    .keys()
                    .filter_map(|name| source.layout.name(name))
                    .collect(),
                Source::Memory(tensors) => tensors.keys().cloned().collect(),
                Source::Packed(matrices) => matrices.keys().cloned().collect(),
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
        self.get_optional(name, shape, dtype, device)?.ok_or_else(|| self.missing(name))
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
            if let Some((stored, all, rows)) = self.stored(source, name) {
                self.check_part(source, name, (&stored, all, &rows), shape)?;
                let Some(tensor) = source.load(&stored, device, &mut |name| self.note(name))?
                else {
                    continue;
                };
                self.note(&stored);
                let part = tensor.narrow(0, rows.start, rows.len())?;
                // A part of its own: the larger matrix is not kept.
                return Ok(Some(part.to_dtype(dtype)?.force_contiguous()?));
            }
            // Before anything of that size is made.
            let Some(checked) = check(source, name, shape) else { continue };
            checked?;
            let Some(tensor) = source.load(name, device, &mut |name| self.note(name))? else {
                continue;
            };
            self.note(name);
            return Ok(Some(tensor.to_dtype(dtype)?.contiguous()?));
        }
        Ok(None)
    }

    /// An error if there is a tensor of the name that has another shape, or none: before anything of that size is made.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub(crate) fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let checked =
            self.sources.iter().rev().find_map(|source| match self.stored(source, name) {
                Some((stored, all, rows)) => {
                    Some(self.check_part(source, name, (&stored, all, &rows), shape))
                }
                None => check(source, name, shape),
            });
        checked.unwrap_or_else(|| Err(self.missing(name)))
    }

    /// An error unless the matrix `stored` has so many rows, of which `rows` are of this shape.
    fn check_part(
        &self,
        source: &Source,
        name: &str,
        (stored, all, rows): (&str, usize, &Range<usize>),
        shape: &[usize],
    ) -> Result<()> {
        let mut whole = shape.to_vec();
        if let Some(first) = whole.first_mut() {
            if *first != rows.len() {
                let reason =
                    format!("tensor {name} has {} rows of {stored}, not {first}", rows.len());
                return Err(broken(source.path_of(stored), reason, UNLIKE));
            }
            *first = all;
        }
        check(source, stored, &whole).unwrap_or_else(|| Err(self.missing(name)))
    }

    /// A matrix of a known shape on the CPU, as the file has it where products can use that; otherwise in f32.
    ///
    /// # Errors
    /// If it is missing or of another shape.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight> {
        self.check_shape(name, &shape)?;
        let part =
            self.sources.iter().rev().find_map(|source| Some((source, self.stored(source, name)?)));
        if let Some((source, (stored, _, rows))) = part
            && let Some(matrix) = source.packed_rows(&stored, rows)?
        {
            self.note(&stored);
            return Ok(Weight::Packed(matrix));
        }
        let source = self.sources.iter().rev().find(|source| source.shape(name).is_some());
        if let Some(matrix) = source.map(|source| source.packed(name)).transpose()?.flatten() {
            self.note(name);
            return Ok(Weight::Packed(matrix));
        }
        Ok(Weight::Dense(self.get(name, &shape, DType::F32, &Device::Cpu)?))
    }

    /// Whether a matrix is stored in blocks that products can use ([`Format`], but not of 16 bits).
    pub(crate) fn is_in_blocks(&self, name: &str) -> bool {
        let found = self.sources.iter().rev().find_map(|source| match self.stored(source, name) {
            Some((stored, ..)) => Some(source.format(&stored)),
            None => source.shape(name).map(|_| source.format(name)),
        });
        found.flatten().is_some_and(|format| !matches!(format, Format::Bf16 | Format::F16))
    }

    /// Notes that a tensor is nothing to compute with and need not be read.
    pub(super) fn pass_over(&self, name: &str) {
        self.note(name);
    }

    fn note(&self, name: &str) {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// Whether a tensor was asked for.
    pub(super) fn was_read(&self, name: &str) -> bool {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    fn missing(&self, name: &str) -> ModelError {
        let hint = match name {
            "lm_head.weight" => {
                "if the embeddings serve as the head, say \"tie_word_embeddings\": true in config.json"
            }
            _ => UNLIKE,
        };
        let path = self.sources.iter().find_map(Source::path);
        broken(path, format!("tensor {name} is missing"), hint)
    }
}

/// Whether a source's tensor has this shape; `None` if the source has no such tensor.
fn check(source: &Source, name: &str, expected: &[usize]) -> Option<Result<()>> {
    let found = source.shape(name)?;
    if found == expected {
        return Some(Ok(()));
    }
    let reason = format!("tensor {name} has shape {found:?}, the configuration needs {expected:?}");
    Some(Err(broken(source.path_of(name), reason, UNLIKE)))
}

fn broken(path: Option<&Path>, reason: String, hint: &str) -> ModelError {
    ModelError::Corrupt {
        path: path.unwrap_or(Path::new("model")).to_path_buf(),
        reason,
        hint: hint.into(),
    }
}

impl Source {
    /// The file, or the first of several; `None` in memory.
    fn path(&self) -> Option<&Path> {
        match self {
            Self::Safetensors { files, .. } => Some(files.path()),
            Self::Gguf(source) => Some(&source.path),
            Self::Memory(_) | Self::Packed(_) => None,
        }
    }

    /// The file that has a tensor.
    fn path_of(&self, name: &str) -> Option<&Path> {
        match self {
            Self::Safetensors { files, .. } => Some(files.get(name)?.path),
            _ => self.path(),
        }
    }

    /// A tensor's shape, if it is there.
    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::Memory(tensors) => Some(tensors.get(name)?.dims().to_vec()),
            Self::Packed(matrices) => {
                matrices.get(name).map(|matrix| vec![matrix.rows(), matrix.columns()])
            }
            Self::Safetensors { files, .. } => Some(files.get(name)?.shape.to_vec()),
            Self::Gguf(source) => {
                let stored = source.layout.stored_name(name)?;
                Some(source.content.tensor_infos.get(&stored)?.shape.dims().to_vec())
            }
        }
    }

    /// The form of a matrix of a GGUF file, or of one that is packed; `None` if it has no product in its own form.
    fn format(&self, name: &str) -> Option<Format> {
        match self {
            Self::Memory(_) | Self::Safetensors { .. } => None,
            Self::Packed(matrices) => Some(matrices.get(name)?.format()),
            Self::Gguf(source) => {
                let stored = source.layout.stored_name(name)?;
                format_of(source.content.tensor_infos.get(&stored)?.ggml_dtype)
            }
        }
    }

    /// A matrix in the file's own form; `None` if it is not there, or in a form that has no product.
    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>> {
        match self {
            Self::Memory(_) => Ok(None),
            Self::Packed(matrices) => Ok(matrices.get(name).cloned()),
            Self::Safetensors { files, .. } => {
                let rows = files.get(name).and_then(|stored| stored.shape.first().copied());
                self.packed_rows(name, 0..rows.unwrap_or(0))
            }
            Self::Gguf(source) => source.packed(name, None),
        }
    }

    /// [`Source::packed`] of some rows of a matrix.
    fn packed_rows(&self, name: &str, part: Range<usize>) -> Result<Option<PackedMatrix>> {
        let files = match self {
            Self::Safetensors { files, .. } => files,
            Self::Gguf(source) => return source.packed(name, Some(part)),
            Self::Memory(_) | Self::Packed(_) => return Ok(None),
        };
        let Some(stored) = files.get(name) else { return Ok(None) };
        let format = match stored.dtype {
            safetensors::Dtype::BF16 => Format::Bf16,
            safetensors::Dtype::F16 => Format::F16,
            _ => return Ok(None),
        };
        let &[_, columns] = stored.shape else { return Ok(None) };
        let bytes = 2 * columns;
        let values = stored.bytes.get(part.start * bytes..part.end * bytes);
        Ok(values.and_then(|values| PackedMatrix::new(format, part.len(), columns, values).ok()))
    }

    /// Loads a tensor; `note` hears of others that were read for it.
    fn load(
        &self,
        name: &str,
        device: &Device,
        note: &mut dyn FnMut(&str),
    ) -> Result<Option<Tensor>> {
        match self {
            Self::Memory(tensors) => {
                Ok(tensors.get(name).map(|t| t.to_device(device)).transpose()?)
            }
            Self::Packed(matrices) => {
                let tensor = matrices
                    .get(name)
                    .map(|matrix| Weight::Packed(matrix.clone()).to_tensor()?.to_device(device));
                Ok(tensor.transpose()?)
            }
            Self::Safetensors { files, quantization } => {
                let Some(stored) = files.get(name) else { return Ok(None) };
                let quantized = quantization.as_ref().and_then(|quantization| {
                    Some((quantization, quantization.element(stored.dtype)?))
                });
                let Some((quantization, element)) = quantized else {
                    return stored.load(device).map(Some);
                };
                let (scale_name, scales) = scales_of(files, name, quantization, &stored)?;
                let values = dequantize(&stored, element, &scales, quantization)?;
                note(&scale_name);
                Ok(Some(Tensor::from_vec(values, stored.shape, device)?))
            }
            Self::Gguf(source) => source.load(name, device),
        }
    }
}

/// The scales of a quantized matrix and their name.
fn scales_of<'a>(
    files: &'a SafetensorsFiles,
    name: &str,
    quantization: &Quantization,
    matrix: &Stored<'_>,
) -> Result<(String, Stored<'a>)> {
    let mut names = quantization.scale_suffixes.iter().map(|suffix| format!("{name}{suffix}"));
    let found = names.find_map(|name| files.get(&name).map(|scales| (name, scales)));
    found.ok_or_else(|| {
        let suffixes = quantization.scale_suffixes.join(" or ");
        matrix.corrupt(format!(
            "is in {:?}, and there are no scales for it (its name and {suffixes})",
            matrix.dtype
        ))
    })
}

/// The form of a GGUF tensor that products can use.
fn format_of(dtype: GgmlDType) -> Option<Format> {
    match dtype {
        GgmlDType::BF16 => Some(Format::Bf16),
        GgmlDType::F16 => Some(Format::F16),
        GgmlDType::Q4_0 => Some(Format::Q4_0),
        GgmlDType::Q4_1 => Some(Format::Q4_1),
        GgmlDType::Q8_0 => Some(Format::Q8_0),
        GgmlDType::Q4K => Some(Format::Q4K),
        GgmlDType::Q6K => Some(Format::Q6K),
        _ => None,
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
        let offset = self.layout.norm_offset(name);
        if offset != 0.0 {
            // Exact for the sum of a 16-bit weight and 1, and of most others.
            return Ok(Some((tensor - offset)?));
        }
        Ok(Some(match self.layout.permuted_heads(name) {
            Some(heads) => {
                let order: Vec<u32> =
                    self.row_order(name, tensor.dim(0)?, heads)?.map(|row| row as u32).collect();
                tensor.index_select(&Tensor::new(order, device)?, 0)?
            }
            None => tensor,
        }))
    }

    /// The stored row of each row of a matrix whose heads are interleaved.
    fn row_order(
        &self,
        name: &str,
        rows: usize,
        heads: usize,
    ) -> Result<impl Iterator<Item = usize>> {
        gguf::row_order(rows, heads).ok_or_else(|| {
            let reason = format!("{name}: {rows} rows are no {heads} heads of whole pairs");
            ModelError::corrupt(&self.path, reason)
        })
    }

    /// All rows of a matrix, or some, in the file's own form.
    fn packed(&self, name: &str, part: Option<Range<usize>>) -> Result<Option<PackedMatrix>> {
        let Some(tensor) = self.read(name)? else { return Ok(None) };
        let Some(format) = format_of(tensor.dtype()) else { return Ok(None) };
        let &[rows, columns] = tensor.shape().dims() else { return Ok(None) };
        let stored = tensor.data()?;
        if let Some(part) = part {
            let size = stored.len() / rows.max(1);
            let values = stored.get(part.start * size..part.end * size);
            let matrix =
                values.map(|values| PackedMatrix::new(format, part.len(), columns, values));
            return Ok(matrix.and_then(std::result::Result::ok));
        }
        let bytes = match self.layout.permuted_heads(name) {
            Some(heads) => {
                let (size, mut ordered) = (stored.len() / rows, Vec::with_capacity(stored.len()));
                for row in self.row_order(name, rows, heads)? {
                    ordered.extend_from_slice(&stored[row * size..(row + 1) * size]);
                }
                Cow::Owned(ordered)
            }
            None => stored,
        };
        Ok(PackedMatrix::new(format, rows, columns, &bytes).ok())
    }
}
