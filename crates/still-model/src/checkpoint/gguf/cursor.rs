//! Bytes of a header, read one after another and never past their end.

use candle_core::quantized::gguf_file::{Value, ValueType};

use super::Fault;

/// Elements that a header's arrays may have together. The largest vocabularies have a million merges; each element takes 32 bytes of
/// memory, however few it takes in the file.
const MOST_ELEMENTS: usize = 1 << 24;

/// Arrays of arrays that are read.
const DEEPEST: usize = 4;

pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Whether counts have 64 bits: from the second version on.
    wide: bool,
    /// Elements that arrays may still have.
    elements: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, wide: true, elements: MOST_ELEMENTS }
    }

    /// Counts have 32 bits from here on.
    pub fn narrow(&mut self) {
        self.wide = false;
    }

    pub fn position(&self) -> usize {
        self.at
    }

    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The fewest bytes that a count, and so an empty string, takes.
    pub fn count_bytes(&self) -> usize {
        if self.wide { 8 } else { 4 }
    }

    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            let at = self.at;
            Fault::Damaged(format!("the GGUF header is damaged or cut off: {count} bytes at {at}"))
        })?;
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn count(&mut self) -> Result<u64, Fault> {
        if self.wide { self.u64() } else { self.u32().map(u64::from) }
    }

    /// A count of things that take at least `size` bytes each.
    pub fn count_of(&mut self, what: &str, size: usize) -> Result<usize, Fault> {
        let count = self.count()?;
        let most = self.remaining() / size.max(1);
        usize::try_from(count).ok().filter(|&count| count <= most).ok_or_else(|| {
            let rest = self.remaining();
            Fault::Damaged(format!(
                "the GGUF header claims {count} {what}, more than its {rest} bytes can hold"
            ))
        })
    }

    fn text_bytes(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.count_of("bytes of text", 1)?;
        self.take(length)
    }

    /// A key or a tensor's name: printed as it is, so that it may not hold what a terminal would obey.
    pub fn name(&mut self, what: &str) -> Result<String, Fault> {
        let bytes = self.text_bytes()?;
        match std::str::from_utf8(bytes) {
            Ok(name) if !name.is_empty() && !name.chars().any(char::is_control) => Ok(name.into()),
            _ => {
                let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
                Err(Fault::Damaged(format!("{what} {start:?} is not a name")))
            }
        }
    }

    /// A metadata value of the type that the file gives next.
    pub fn value(&mut self) -> Result<Value, Fault> {
        let kind = self.kind()?;
        let mut value = self.value_of(kind, 0)?;
        if let Value::String(text) = &mut value {
            // Some writers end their strings as C does.
            text.truncate(text.trim_end_matches('\0').len());
        }
        Ok(value)
    }

    fn kind(&mut self) -> Result<ValueType, Fault> {
        let number = self.u32()?;
        Ok(match number {
            0 => ValueType::U8,
            1 => ValueType::I8,
            2 => ValueType::U16,
            3 => ValueType::I16,
            4 => ValueType::U32,
            5 => ValueType::I32,
            6 => ValueType::F32,
            7 => ValueType::Bool,
            8 => ValueType::String,
            9 => ValueType::Array,
            10 => ValueType::U64,
            11 => ValueType::I64,
            12 => ValueType::F64,
            _ => return Err(Fault::Damaged(format!("GGUF has no value type {number}"))),
        })
    }

    fn value_of(&mut self, kind: ValueType, depth: usize) -> Result<Value, Fault> {
        Ok(match kind {
            ValueType::U8 => Value::U8(self.array::<1>()?[0]),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array()?)),
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
            ValueType::Bool => match self.array::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(Fault::Damaged(format!("{other} is not true or false"))),
            },
            // Texts are UTF-8, but not every writer has seen to it.
            ValueType::String => {
                Value::String(String::from_utf8_lossy(self.text_bytes()?).into_owned())
            }
            ValueType::Array => self.array_value(depth)?,
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<Value, Fault> {
        if depth == DEEPEST {
            return Err(Fault::Damaged(format!("arrays are nested {depth} deep")));
        }
        let kind = self.kind()?;
        let size = match kind {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 => 8,
            ValueType::String => self.count_bytes(),
            ValueType::Array => 4 + self.count_bytes(),
        };
        let length = self.count_of("elements of an array", size)?;
        self.elements = self.elements.checked_sub(length).ok_or_else(|| {
            Fault::Damaged(format!(
                "the GGUF header has arrays of more than {MOST_ELEMENTS} elements"
            ))
        })?;
        let mut values = Vec::with_capacity(length);
        for _ in 0..length {
            values.push(self.value_of(kind, depth + 1)?);
        }
        Ok(Value::Array(values))
    }
}
