//! A GGUF file's header and the places of its tensors, checked against the file before anything of it is used.
//!
//! The tensor library reads what such a directory says without another look: sizes must be those of whole blocks, and lie
//! in the file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::Shape;
use candle_core::quantized::gguf_file::{
    Content, DEFAULT_ALIGNMENT, TensorInfo, Value, VersionedMagic,
};

use super::Fault;
use super::cursor::Cursor;
use super::types::tensor_type;

/// Axes that a tensor may have.
const MOST_AXES: u32 = 4;

/// The directory at the beginning of a whole file's `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Result<Content, Fault> {
    let mut at = Cursor::new(bytes);
    if bytes.get(..4) != Some(b"GGUF") {
        return Err(Fault::Damaged("not a GGUF file".into()));
    }
    at.take(4)?;
    let magic = version(at.u32()?)?;
    if magic == VersionedMagic::GgufV1 {
        at.narrow();
    }
    // A name, a number of axes, a type and an offset; a key, a type and a value.
    let (of_tensor, of_entry) = (at.count_bytes() + 16, at.count_bytes() + 5);
    let tensors = at.count_of("tensors", of_tensor)?;
    let entries = at.count_of("metadata entries", of_entry)?;

    let mut metadata = HashMap::new();
    for _ in 0..entries {
        let key = at.name("the metadata key")?;
        let value = at.value().map_err(|fault| fault.of(&key))?;
        match metadata.entry(key) {
            Entry::Vacant(place) => place.insert(value),
            Entry::Occupied(place) => {
                let key = place.key();
                return Err(Fault::Damaged(format!("the metadata key {key} is there twice")));
            }
        };
    }
    let alignment = alignment(metadata.get("general.alignment"))?;

    let mut tensor_infos = HashMap::new();
    for _ in 0..tensors {
        let name = at.name("the tensor name")?;
        let info = tensor(&mut at, &name)?;
        if !info.offset.is_multiple_of(alignment) {
            let offset = info.offset;
            return Err(Fault::Damaged(format!(
                "tensor {name} begins at {offset}, which is no multiple of the alignment {alignment}"
            )));
        }
        match tensor_infos.entry(name) {
            Entry::Vacant(place) => place.insert(info),
            Entry::Occupied(place) => {
                let name = place.key();
                return Err(Fault::Damaged(format!("tensor {name} is there twice")));
            }
        };
    }
    // Below 2^63 + 2^31, as no file is longer.
    let tensor_data_offset = (at.position() as u64).next_multiple_of(alignment);
    check_places(&tensor_infos, tensor_data_offset, bytes.len() as u64)?;
    Ok(Content { magic, metadata, tensor_infos, tensor_data_offset })
}

fn version(number: u32) -> Result<VersionedMagic, Fault> {
    match number {
        1 => Ok(VersionedMagic::GgufV1),
        2 => Ok(VersionedMagic::GgufV2),
        3 => Ok(VersionedMagic::GgufV3),
        other if (1..=3).contains(&other.swap_bytes()) => Err(Fault::Unsupported {
            what: "big-endian GGUF".into(),
            hint: "use the little-endian file of this model".into(),
        }),
        other => Err(Fault::Unsupported {
            what: format!("GGUF of version {other}"),
            hint: "versions 1 to 3 are read: if this is a newer one, convert the model again"
                .into(),
        }),
    }
}

fn alignment(value: Option<&Value>) -> Result<u64, Fault> {
    let number = match value {
        None => Some(DEFAULT_ALIGNMENT),
        Some(Value::U32(number)) => Some(u64::from(*number)),
        Some(_) => None,
    };
    number
        .filter(|number| number.is_power_of_two())
        .ok_or_else(|| Fault::Damaged("general.alignment is not a power of two of type u32".into()))
}

/// The rest of a tensor's entry, sound in itself.
fn tensor(at: &mut Cursor<'_>, name: &str) -> Result<TensorInfo, Fault> {
    let axes = at.u32()?;
    if !(1..=MOST_AXES).contains(&axes) {
        return Err(Fault::Damaged(format!("tensor {name} has {axes} axes, not 1 to {MOST_AXES}")));
    }
    let mut dims = Vec::with_capacity(axes as usize);
    for _ in 0..axes {
        dims.push(usize::try_from(at.count()?).unwrap_or(usize::MAX));
    }
    // The file has the row's length first.
    let row = dims[0];
    dims.reverse();
    let ggml_dtype = tensor_type(at.u32()?, name)?;
    let offset = at.u64()?;
    let elements = dims.iter().try_fold(1_usize, |all, &dim| all.checked_mul(dim));
    if elements.is_none_or(|elements| elements == 0) {
        return Err(Fault::Damaged(format!("tensor {name} has the impossible shape {dims:?}")));
    }
    let block = ggml_dtype.block_size();
    if !row.is_multiple_of(block) {
        return Err(Fault::Damaged(format!(
            "tensor {name} has rows of {row} values, no whole blocks of {block} as {ggml_dtype:?} needs"
        )));
    }
    Ok(TensorInfo { ggml_dtype, shape: Shape::from(dims), offset })
}

/// An error unless every tensor lies in the file and none in another.
fn check_places(
    tensors: &HashMap<String, TensorInfo>,
    data: u64,
    length: u64,
) -> Result<(), Fault> {
    let mut places = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let blocks = info.shape.elem_count() / info.ggml_dtype.block_size();
        let size = (blocks as u64).checked_mul(info.ggml_dtype.type_size() as u64);
        let start = data.checked_add(info.offset);
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= length => places.push((start, end, name)),
            (_, Some(end)) => {
                return Err(Fault::Damaged(format!(
                    "truncated: tensor {name} ends at byte {end} of {length}"
                )));
            }
            _ => {
                return Err(Fault::Damaged(format!(
                    "truncated: tensor {name} ends beyond the {length} bytes of the file"
                )));
            }
        }
    }
    places.sort_unstable();
    match places.windows(2).find(|two| two[1].0 < two[0].1) {
        Some(two) => {
            let (one, other) = (two[0].2, two[1].2);
            Err(Fault::Damaged(format!("tensors {one} and {other} overlap")))
        }
        None => Ok(()),
    }
}
