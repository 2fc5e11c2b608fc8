//! Safetensors files as they lie in memory: names, dtypes, shapes and bytes. Nothing is copied before it is asked for, and
//! every range was compared with the file when it was opened.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, SafeTensors};
use safetensors::{Dtype, SafeTensorError};

use crate::error::{ModelError, Result};
use crate::seal::{self, Kind};

/// Bytes before a safetensors header: its length.
const PREFIX: usize = 8;
/// Of a decoder saved without its head (`LlamaModel`), names begin after this.
const BODY: &str = "model.";

/// Files that together hold a model.
pub(super) struct SafetensorsFiles {
    files: Vec<OpenFile>,
    /// By the name that a model with its head has them under: the file and the name there.
    index: BTreeMap<String, (usize, String)>,
}

struct OpenFile {
    path: PathBuf,
    map: Mmap,
    /// Where tensors begin.
    data: usize,
    metadata: Metadata,
}

/// One tensor of a file.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a> {
    /// Its name in the file.
    pub name: &'a str,
    pub path: &'a Path,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

impl SafetensorsFiles {
    /// Memory-maps the files.
    ///
    /// # Errors
    /// A missing, truncated or otherwise broken file, named; a tensor that two of them have.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let files = paths.iter().map(|path| OpenFile::open(path)).collect::<Result<Vec<_>>>()?;
        let mut index: BTreeMap<String, (usize, String)> = BTreeMap::new();
        for (n, file) in files.iter().enumerate() {
            for name in file.metadata.tensors().into_keys() {
                if let Some((first, _)) = index.insert(name.clone(), (n, name.clone())) {
                    return Err(ModelError::Corrupt {
                        path: file.path.clone(),
                        reason: format!("tensor {name} is also in {}", files[first].path.display()),
                        hint: "each tensor belongs to one shard: fetch or export the model again"
                            .into(),
                    });
                }
            }
        }
        if index.contains_key("embed_tokens.weight")
            && !index.keys().any(|name| name.starts_with(BODY))
        {
            index = index
                .into_iter()
                .map(|(name, place)| match name.starts_with("lm_head.") {
                    true => (name, place),
                    false => (format!("{BODY}{name}"), place),
                })
                .collect();
        }
        Ok(Self { files, index })
    }

    /// Every tensor by its name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Stored<'_>)> {
        self.index.keys().filter_map(|name| Some((name.as_str(), self.get(name)?)))
    }

    /// A tensor, if one of the files has it.
    pub fn get(&self, name: &str) -> Option<Stored<'_>> {
        let (file, stored) = self.index.get(name)?;
        let file = &self.files[*file];
        let info = file.metadata.info(stored)?;
        let (start, end) = info.data_offsets;
        Some(Stored {
            name: stored,
            path: &file.path,
            dtype: info.dtype,
            shape: &info.shape,
            bytes: &file.map[file.data + start..file.data + end],
        })
    }

    /// The first file.
    pub fn path(&self) -> &Path {
        self.files.first().map_or(Path::new("model"), |file| &file.path)
    }
}

impl OpenFile {
    fn open(path: &Path) -> Result<Self> {
        let map = map(path)?;
        seal::expect(path, &map, Kind::Safetensors, false)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| broken(path, &error))?;
        Ok(Self { path: path.to_path_buf(), map, data: PREFIX + header, metadata })
    }
}

/// Memory-maps a file that is long enough to have a header.
///
/// # Errors
/// An unreadable file, one that is no regular file or too short.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(ModelError::read(path))?;
    let metadata = file.metadata().map_err(ModelError::read(path))?;
    if !metadata.is_file() {
        return Err(ModelError::corrupt(path, "is not a regular file"));
    }
    if metadata.len() < PREFIX as u64 {
        let reason = format!("{} bytes are too few for safetensors", metadata.len());
        return Err(ModelError::corrupt(path, reason));
    }
    // SAFETY: the map is read-only; as with any mapped file, another process must not truncate it while it is in use.
    unsafe { Mmap::map(&file) }.map_err(ModelError::read(path))
}

fn broken(path: &Path, error: &SafeTensorError) -> ModelError {
    ModelError::corrupt(path, format!("not valid safetensors: {error}"))
}

impl Stored<'_> {
    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The tensor, as floats of the width that the file has.
    ///
    /// # Errors
    /// A dtype that is no number to compute with, named.
    pub fn load(&self, device: &Device) -> Result<Tensor> {
        let dtype = match self.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => return Err(self.of_dtype()),
        };
        Ok(Tensor::from_raw_buffer(self.bytes, dtype, self.shape, device)?)
    }

    /// The values in f32.
    ///
    /// # Errors
    /// As [`Stored::load`].
    pub fn values(&self) -> Result<Vec<f32>> {
        Ok(self.load(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// The error of a dtype that weights do not have.
    pub fn of_dtype(&self) -> ModelError {
        ModelError::Unsupported {
            what: format!("tensor {} in {:?}", self.name, self.dtype),
            found_in: Some(self.path.to_path_buf()),
            hint: "weights are read in F32, F16, BF16 and F64; 8-bit ones (F8_E4M3, I8) if config.json has a \
                   quantization_config that says how they are scaled"
                .into(),
        }
    }

    /// The error of a tensor that is not what it should be.
    pub fn corrupt(&self, reason: impl std::fmt::Display) -> ModelError {
        ModelError::corrupt(self.path, format!("tensor {} {reason}", self.name))
    }
}
