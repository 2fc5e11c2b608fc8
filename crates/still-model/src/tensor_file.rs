//! Safetensors files of our own: written one tensor at a time, so that no more than one is on the host at once, and with a digest
//! ([`seal`]) that is checked when they are read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use crate::error::{ModelError, Result};
use crate::seal::{self, Kind};

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// A tensor that is made when its turn to be written comes.
pub struct Entry<'a> {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    values: Box<dyn Fn() -> Result<Tensor> + 'a>,
}

impl std::fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

impl<'a> Entry<'a> {
    /// The tensor `values()` of a known dtype and shape, on any device.
    pub fn new(
        name: String,
        dtype: DType,
        shape: Vec<usize>,
        values: impl Fn() -> Result<Tensor> + 'a,
    ) -> Self {
        Self { name, dtype, shape, values: Box::new(values) }
    }

    /// A tensor as it is.
    pub fn of(name: String, tensor: Tensor) -> Self {
        let (dtype, shape) = (tensor.dtype(), tensor.dims().to_vec());
        Self::new(name, dtype, shape, move || Ok(tensor.clone()))
    }

    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its dtype in the file.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its shape in the file.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its values, on the CPU.
    ///
    /// # Errors
    /// Of what makes them; if they are not what the entry says.
    pub fn tensor(&self) -> Result<Tensor> {
        let tensor = (self.values)()?.to_device(&Device::Cpu)?.contiguous()?;
        if tensor.dtype() != self.dtype || tensor.dims() != self.shape {
            let (dtype, shape) = (tensor.dtype(), tensor.dims());
            return Err(ModelError::Invalid(format!("{self:?} is made as {dtype:?} {shape:?}")));
        }
        Ok(tensor)
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}

/// Writes a safetensors file with a digest, in the dialect that every reader takes (`format: pt`).
///
/// # Errors
/// A tensor that is not what its entry says; a file that cannot be written.
pub fn write_tensors(path: &Path, entries: Vec<Entry<'_>>) -> Result<()> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    let mut out = BufWriter::with_capacity(BUFFER, file.map_err(ModelError::write(path))?);
    write_entries(&mut out, path, entries)?;
    let file = out.into_inner().map_err(|error| ModelError::write(path)(error.into_error()));
    seal::seal(&mut file?, Kind::Safetensors).map_err(ModelError::write(path))
}

/// [`write_tensors`] in a single step: what stood there before stays until all is written.
///
/// # Errors
/// As there.
pub fn replace_tensors(path: &Path, entries: Vec<Entry<'_>>) -> Result<()> {
    // An error of an entry is not of the file's writing.
    let mut failed = None;
    let written = crate::files::write_file_with(
        path,
        |out| {
            write_entries(out, path, entries).map_err(|error| {
                let stopped = std::io::Error::other(error.to_string());
                failed = Some(error);
                stopped
            })
        },
        |file| seal::seal(file, Kind::Safetensors),
    );
    match failed {
        Some(error) => Err(error),
        None => written.map_err(ModelError::write(path)),
    }
}

/// The bytes of the file that [`write_tensors`] writes. `path` is what errors call it.
///
/// # Errors
/// A tensor that is not what its entry says.
pub fn encode_tensors(path: &Path, entries: Vec<Entry<'_>>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    write_entries(&mut bytes, path, entries)?;
    seal::seal_bytes(&mut bytes, Kind::Safetensors).map_err(ModelError::write(path))?;
    Ok(bytes)
}

/// The header and the data, not yet sealed.
fn write_entries(out: &mut impl Write, path: &Path, mut entries: Vec<Entry<'_>>) -> Result<()> {
    // The library's own order: wide types first, so that every tensor is aligned.
    let key = |entry: &Entry<'_>| Dtype::from(entry.dtype);
    entries.sort_by(|a, b| key(b).cmp(&key(a)).then_with(|| a.name.cmp(&b.name)));
    let header = header(&entries);
    let length = (header.len() as u64).to_le_bytes();
    for bytes in [&length, header.as_slice()] {
        out.write_all(bytes).map_err(ModelError::write(path))?;
    }
    for entry in &entries {
        out.write_all(&entry.tensor()?.data()).map_err(ModelError::write(path))?;
    }
    Ok(())
}

/// Reads every tensor of a file that [`write_tensors`] wrote, onto the CPU; one without a digest only if it need not be `sealed`.
///
/// # Errors
/// [`ModelError::Corrupt`] for a file that is damaged; a file that cannot be read.
pub fn read_tensors(path: &Path, sealed: bool) -> Result<HashMap<String, Tensor>> {
    let file = crate::files::open(path).map_err(ModelError::read(path))?;
    if file.metadata().map_err(ModelError::read(path))?.len() == 0 {
        return Err(ModelError::corrupt(path, "damaged: it is empty"));
    }
    // SAFETY: the map is read-only and ends with this function; nobody cuts the file short meanwhile.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::read(path))?;
    decode_tensors(path, &map, sealed)
}

/// [`read_tensors`] of the bytes of a file, which errors call `path`.
///
/// # Errors
/// [`ModelError::Corrupt`] for bytes that are damaged.
pub fn decode_tensors(path: &Path, bytes: &[u8], sealed: bool) -> Result<HashMap<String, Tensor>> {
    seal::expect(path, bytes, Kind::Safetensors, sealed)?;
    candle_core::safetensors::load_buffer(bytes, &Device::Cpu)
        .map_err(|error| ModelError::corrupt(path, format!("damaged: {error}")))
}

/// [`write_tensors`] of tensors in memory.
///
/// # Errors
/// As [`write_tensors`].
pub fn save_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let entry = |(name, tensor): (&String, &Tensor)| Entry::of(name.clone(), tensor.clone());
    write_tensors(path, tensors.iter().map(entry).collect())
}

/// The header, padded so that the data begins at a multiple of eight bytes.
fn header(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt", seal::KEY: seal::BLANK }));
    let mut at = 0;
    for entry in entries {
        let end = at + entry.bytes();
        let info = json!({
            "dtype": Value::String(format!("{:?}", Dtype::from(entry.dtype))),
            "shape": entry.shape,
            "data_offsets": [at, end],
        });
        header.insert(entry.name.clone(), info);
        at = end;
    }
    let mut bytes = Value::Object(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_the_library_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let tensor = |count: usize, dtype| {
            let values: Vec<f32> = (0..count).map(|n| n as f32 - 2.5).collect();
            Tensor::from_vec(values, (1, count), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let tensors = HashMap::from([
            ("b".to_owned(), tensor(3, DType::BF16)),
            ("a\"quoted\"".to_owned(), tensor(5, DType::F16)),
            ("c".to_owned(), tensor(7, DType::F32).t().unwrap()),
            ("empty".to_owned(), tensor(0, DType::F32)),
        ]);
        save_tensors(&path, &tensors).unwrap();
        let written = std::fs::read(&path).unwrap();
        let read = safetensors::SafeTensors::deserialize(&written).unwrap();
        for (name, tensor) in &tensors {
            let view = read.tensor(name).unwrap();
            assert_eq!((view.shape(), view.data()), (tensor.dims(), &*tensor.data()), "{name}");
        }
        // The same data in the same order.
        let expected = safetensors::serialize(&tensors, None).unwrap();
        let bytes: usize = tensors.values().map(|tensor| tensor.data_len()).sum();
        assert_eq!(written[written.len() - bytes..], expected[expected.len() - bytes..]);
        assert_eq!((written.len() - bytes) % 8, 0);
    }

    /// In the header or in the data: it is damage, never other values.
    #[test]
    fn no_flipped_bit_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let tensor = Tensor::new(&[1.0_f32, 2.0, 3.0], &Device::Cpu).unwrap();
        save_tensors(&path, &HashMap::from([("a".to_owned(), tensor)])).unwrap();
        assert_eq!(read_tensors(&path, true).unwrap().len(), 1);
        let whole = std::fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, bytes).unwrap();
            let error = read_tensors(&path, true).unwrap_err();
            assert!(matches!(error, ModelError::Corrupt { .. }), "bit {bit}: {error}");
        }
        for length in [0, 7, 8, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read_tensors(&path, true).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn an_entry_that_is_not_what_it_says_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        for (dtype, shape) in [(DType::BF16, 3), (DType::F32, 4)] {
            let tensor = tensor.clone();
            let entry = Entry::new("a".into(), dtype, vec![shape], move || Ok(tensor.clone()));
            assert!(write_tensors(&dir.path().join("a"), vec![entry]).is_err());
        }
    }

    /// As any new file: a student that others may not read is of little use in a shared directory.
    #[cfg(unix)]
    #[test]
    fn files_have_the_mode_that_the_umask_leaves() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
        let (ours, usual) = (dir.path().join("a"), dir.path().join("b"));
        save_tensors(&ours, &HashMap::new()).unwrap();
        std::fs::write(&usual, "").unwrap();
        assert_eq!(mode(&ours), mode(&usual));
    }
}
