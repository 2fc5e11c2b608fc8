//! Changes of binary files' fields.

use std::ops::Range;

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::json;

/// Numbers that programs trip over.
pub const EXTREME: [u64; 14] = [
    0,
    1,
    2,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// A safetensors file: its header as JSON, the length of it, or a piece of the tensors.
pub fn safetensors(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) -> Option<String> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let end = 8 + usize::try_from(length).ok()?;
    match rng.random_range(0..8) {
        0 => {
            let length = *EXTREME.choose(rng)?;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            Some(format!("header of {length} bytes"))
        }
        1 => {
            // What no weight should be.
            // What was cut before has no tensors left.
            let last = bytes.len().checked_sub(4).filter(|&last| last > end)?;
            let at = rng.random_range(end..last) / 4 * 4;
            let value = *[f32::NAN, f32::INFINITY, f32::MAX, -1e30, 1e-40].choose(rng)?;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            Some(format!("{value} at {at}"))
        }
        _ => {
            let mut header: Value = serde_json::from_slice(bytes.get(8..end)?).ok()?;
            let done = json::mutate(&mut header, rng);
            let header = serde_json::to_vec(&header).ok()?;
            let mut changed = (header.len() as u64).to_le_bytes().to_vec();
            changed.extend(header);
            changed.extend(&bytes[end..]);
            *bytes = changed;
            Some(format!("header: {done}"))
        }
    }
}

/// A GGUF file: one number of its directory, a type, a length, a name, or a value.
pub fn gguf(bytes: &mut [u8], rng: &mut ChaCha8Rng) -> Option<String> {
    let fields = Gguf { bytes, at: 0, fields: Vec::new() }.walk();
    // Vocabularies have thousands: each kind of field is as likely as the others.
    let mut kinds: Vec<&str> = fields.iter().map(|(kind, _)| *kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let kind = *kinds.choose(rng)?;
    let of_kind: Vec<&Range<usize>> =
        fields.iter().filter(|(other, _)| *other == kind).map(|(_, range)| range).collect();
    let range = (*of_kind.choose(rng)?).clone();
    let before = bytes[range.clone()].to_vec();
    if kind == "text" {
        let at = rng.random_range(range);
        bytes[at] = *[0, b'x', b'"', 0xff, b'.', b'9'].choose(rng)?;
        return Some(format!("{kind} at {at}"));
    }
    let mut number = [0; 8];
    number[..before.len()].copy_from_slice(&before);
    let number = u64::from_le_bytes(number);
    let number = match rng.random_range(0..6) {
        0 => number.wrapping_add(1),
        1 => number.wrapping_sub(1),
        2 => number.wrapping_mul(*[2, 3, 32, 1000].choose(rng)?),
        _ => *EXTREME.choose(rng)?,
    };
    bytes[range.clone()].copy_from_slice(&number.to_le_bytes()[..range.len()]);
    Some(format!("{kind} at {} = {number}", range.start))
}

/// Where the fields of a file lie.
struct Gguf<'a> {
    bytes: &'a [u8],
    at: usize,
    fields: Vec<(&'static str, Range<usize>)>,
}

impl Gguf<'_> {
    fn walk(mut self) -> Vec<(&'static str, Range<usize>)> {
        // Until something is none of the format: the file may have been changed already.
        let _ = self.directory();
        let length = self.bytes.len();
        self.fields.retain(|(_, range)| !range.is_empty() && range.end <= length);
        self.fields
    }

    fn directory(&mut self) -> Option<()> {
        self.number("magic", 4)?;
        self.number("version", 4)?;
        let tensors = self.number("tensor count", 8)?;
        let values = self.number("value count", 8)?;
        for _ in 0..values {
            self.text()?;
            let kind = self.number("value type", 4)?;
            self.value(kind)?;
        }
        for _ in 0..tensors {
            self.text()?;
            for _ in 0..self.number("dimensions", 4)?.min(8) {
                self.number("dimension", 8)?;
            }
            self.number("tensor type", 4)?;
            self.number("tensor offset", 8)?;
        }
        Some(())
    }

    fn number(&mut self, kind: &'static str, width: usize) -> Option<u64> {
        let range = self.at..self.at + width;
        let bytes = self.bytes.get(range.clone())?;
        self.at += width;
        self.fields.push((kind, range));
        Some(bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    }

    fn text(&mut self) -> Option<()> {
        let length = self.number("text length", 8)?;
        let end = self.at.checked_add(usize::try_from(length).ok()?)?;
        self.bytes.get(self.at..end)?;
        self.fields.push(("text", self.at..end));
        self.at = end;
        Some(())
    }

    fn value(&mut self, kind: u64) -> Option<()> {
        match kind {
            0 | 1 | 7 => self.number("value", 1).map(drop),
            2 | 3 => self.number("value", 2).map(drop),
            4..=6 => self.number("value", 4).map(drop),
            10..=12 => self.number("value", 8).map(drop),
            8 => self.text(),
            9 => {
                let kind = self.number("entry type", 4)?;
                let count = self.number("entry count", 8)?;
                for _ in 0..count {
                    self.value(kind)?;
                }
                Some(())
            }
            _ => None,
        }
    }
}
