//! A TensorBoard event file of scalars: records of a length, an `Event` in protobuf, and a masked CRC-32C of each.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes scalars. Each is on the disk when its call returns.
pub struct EventFile<W> {
    to: W,
}

/// Fields of `Event`, of its `Summary`, and of that one's `Value`: number and wire type, as protobuf has them.
mod field {
    const VARINT: u8 = 0;
    const F64: u8 = 1;
    const BYTES: u8 = 2;
    const F32: u8 = 5;

    pub const WALL_TIME: u8 = 1 << 3 | F64;
    pub const STEP: u8 = 2 << 3 | VARINT;
    pub const FILE_VERSION: u8 = 3 << 3 | BYTES;
    pub const SUMMARY: u8 = 5 << 3 | BYTES;
    pub const VALUE: u8 = 1 << 3 | BYTES;
    pub const TAG: u8 = 1 << 3 | BYTES;
    pub const SIMPLE_VALUE: u8 = 2 << 3 | F32;
}

impl<W: Write> EventFile<W> {
    /// Begins a file with the event that names its version.
    ///
    /// # Errors
    /// Those of writing.
    pub fn new(to: W) -> io::Result<Self> {
        let mut file = Self { to };
        file.event(seconds(), 0, field::FILE_VERSION, b"brain.Event:2")?;
        Ok(file)
    }

    /// Adds the value of `tag` at a step.
    ///
    /// # Errors
    /// Those of writing.
    pub fn scalar(&mut self, tag: &str, step: usize, value: f32) -> io::Result<()> {
        self.scalar_at(seconds(), tag, step, value)
    }

    fn scalar_at(&mut self, time: f64, tag: &str, step: usize, value: f32) -> io::Result<()> {
        let mut scalar = Vec::new();
        bytes(&mut scalar, field::TAG, tag.as_bytes());
        scalar.push(field::SIMPLE_VALUE);
        scalar.extend(value.to_le_bytes());
        let mut summary = Vec::new();
        bytes(&mut summary, field::VALUE, &scalar);
        self.event(time, step, field::SUMMARY, &summary)
    }

    /// Writes an event of one field besides its time and its step, which protobuf leaves out if it is 0.
    fn event(&mut self, time: f64, step: usize, what: u8, content: &[u8]) -> io::Result<()> {
        let mut event = vec![field::WALL_TIME];
        event.extend(time.to_le_bytes());
        if step > 0 {
            event.push(field::STEP);
            varint(&mut event, step);
        }
        bytes(&mut event, what, content);
        let length = (event.len() as u64).to_le_bytes();
        self.to.write_all(&length)?;
        self.to.write_all(&masked_crc32c(&length).to_le_bytes())?;
        self.to.write_all(&event)?;
        self.to.write_all(&masked_crc32c(&event).to_le_bytes())?;
        self.to.flush()
    }
}

/// Seconds since 1970.
fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Seven bits a byte, the lowest first; all bytes but the last have the highest bit set.
fn varint(to: &mut Vec<u8>, mut value: usize) {
    while value > 0x7f {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

fn bytes(to: &mut Vec<u8>, key: u8, content: &[u8]) {
    to.push(key);
    varint(to, content.len());
    to.extend(content);
}

/// CRC-32C (Castagnoli), turned and shifted so that a checksum of data that holds checksums is a sound one.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What TensorFlow writes: `hello` is 42 at step 10, 0.57 s after 1,608,105,178 seconds.
    const TENSORFLOW: [u8; 43] = [
        27, 0, 0, 0, 0, 0, 0, 0, 26, 13, 158, 19, 9, 188, 119, 164, 54, 111, 246, 215, 65, 16, 10,
        42, 14, 10, 12, 10, 5, 104, 101, 108, 108, 111, 21, 0, 0, 40, 66, 93, 240, 111, 128,
    ];

    #[test]
    fn a_scalar_has_the_bytes_that_tensorflow_writes() {
        let mut file = EventFile { to: Vec::new() };
        file.scalar_at(1_608_105_178.569_808, "hello", 10, 42.0).unwrap();
        assert_eq!(file.to, TENSORFLOW);
    }

    #[test]
    fn long_numbers_take_several_bytes() {
        let bytes_of = |value| {
            let mut bytes = Vec::new();
            varint(&mut bytes, value);
            bytes
        };
        assert_eq!(bytes_of(0), [0]);
        assert_eq!(bytes_of(127), [127]);
        assert_eq!(bytes_of(128), [128, 1]);
        assert_eq!(bytes_of(100_000), [0xa0, 0x8d, 0x06]);
    }
}
