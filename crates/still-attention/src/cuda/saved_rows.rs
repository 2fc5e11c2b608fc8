//! Rows as a state on the device keeps them, and as every state is saved: [`crate::SavedState`].
//!
//! Codes lie otherwise for tensor cores (`codes.cuh` of `still-kernels`). 8-bit codes have the middle two of each four bytes
//! exchanged. 4-bit codes lie by groups of 32 channels, channel `i` in the low half of a byte and `i + 16` in its high half, with the
//! same exchange; a saved byte has two neighbours.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use still_kernels::{STILL_INT4, STILL_INT8};

use super::store::Coding;
use crate::config::FOUR_BIT_GROUP as GROUP;
use crate::{Result, SavedState};

/// Bytes that scale and offset a group of 4-bit codes.
pub(super) const GROUP_WORD: usize = size_of::<u32>();

/// Rows in the host's memory, as the device keeps them: their values or codes, and behind those of all rows their scales.
pub(super) struct DeviceRows<B> {
    pub values: B,
    pub scales: B,
}

/// Where among bytes in order the device has byte `i`, and the other way round.
fn exchanged(i: usize) -> usize {
    (i & !3) | (i & 1) << 1 | (i >> 1 & 1)
}

/// The byte of a row that has a channel's 4-bit code, and by how much the code is shifted.
fn place(channel: usize) -> (usize, usize) {
    let (group, lane) = (channel / GROUP, channel % GROUP);
    (group * GROUP / 2 + exchanged(lane % (GROUP / 2)), lane / (GROUP / 2) * 4)
}

impl Coding {
    /// The dtype that values or codes are saved in.
    fn saved_dtype(&self) -> DType {
        match self.kind {
            STILL_INT8 | STILL_INT4 => DType::U8,
            _ if self.value_bytes == self.width * size_of::<bf16>() => DType::BF16,
            _ => DType::F32,
        }
    }

    /// Puts whole rows among a state's tensors.
    pub fn save(
        &self,
        rows: &DeviceRows<&[u8]>,
        state: &mut SavedState,
        part: usize,
        name: &str,
    ) -> Result<()> {
        let DeviceRows { values, scales } = *rows;
        let (count, width, cpu) = (values.len() / self.value_bytes, self.width, &Device::Cpu);
        let each = || values.chunks_exact(self.value_bytes);
        if self.kind == STILL_INT8 {
            let codes = each().flat_map(|row| (0..width).map(move |i| row[exchanged(i)]));
            put(state, part, name, codes.collect(), (count, width))?;
            let scales = Tensor::from_raw_buffer(scales, DType::F32, &[count], cpu)?;
            state.put(part, &format!("{name}_scale"), scales);
        } else if self.kind == STILL_INT4 {
            let code = |row: &[u8], channel: usize| {
                let (byte, shift) = place(channel);
                if channel < width { row[byte] >> shift & 15 } else { 0 }
            };
            let pairs = (0..width).step_by(2);
            let pair = move |row: &[u8], at: usize| code(row, at) | code(row, at + 1) << 4;
            let codes = each().flat_map(|row| pairs.clone().map(move |at| pair(row, at)));
            put(state, part, name, codes.collect(), (count, width.div_ceil(2)))?;
            for (what, at) in FACTORS {
                let words = scales.chunks_exact(GROUP_WORD);
                let halves = words.map(|word| f16::from_le_bytes([word[at], word[at + 1]]));
                let halves =
                    Tensor::from_vec(halves.collect(), (count, width.div_ceil(GROUP)), cpu)?;
                state.put(part, &format!("{name}_{what}"), halves);
            }
        } else {
            let rows = Tensor::from_raw_buffer(values, self.saved_dtype(), &[count, width], cpu)?;
            state.put(part, name, rows);
        }
        Ok(())
    }

    /// Takes `count` rows back, to the first of `to`.
    pub fn restore(
        &self,
        state: &mut SavedState,
        (part, name): (usize, &str),
        count: usize,
        to: &mut DeviceRows<&mut [u8]>,
    ) -> Result<()> {
        let (width, rows) = (self.width, Some(count));
        let columns = if self.kind == STILL_INT4 { width.div_ceil(2) } else { width };
        let saved = state.take(part, name, self.saved_dtype(), &[rows, Some(columns)])?;
        let saved = bytes(&saved)?;
        let coded = matches!(self.kind, STILL_INT8 | STILL_INT4);
        let row_bytes = if coded { columns } else { self.value_bytes };
        let pairs = saved.chunks_exact(row_bytes).zip(to.values.chunks_exact_mut(self.value_bytes));
        match self.kind {
            STILL_INT8 => {
                pairs.for_each(|(row, to)| (0..width).for_each(|i| to[exchanged(i)] = row[i]));
                let scales = state.take(part, &format!("{name}_scale"), DType::F32, &[rows])?;
                let scales = bytes(&scales)?;
                to.scales[..scales.len()].copy_from_slice(&scales);
            }
            STILL_INT4 => {
                for (row, to) in pairs {
                    for channel in 0..width {
                        let (byte, shift) = place(channel);
                        let code = row[channel / 2] >> (channel % 2 * 4) & 15;
                        to[byte] = to[byte] & !(15 << shift) | code << shift;
                    }
                }
                for (what, at) in FACTORS {
                    let shape = [rows, Some(width.div_ceil(GROUP))];
                    let saved = state.take(part, &format!("{name}_{what}"), DType::F16, &shape)?;
                    let saved = bytes(&saved)?;
                    let words = to.scales.chunks_exact_mut(GROUP_WORD);
                    for (half, word) in saved.chunks_exact(2).zip(words) {
                        word[at..at + 2].copy_from_slice(half);
                    }
                }
            }
            _ => pairs.for_each(|(row, to)| to.copy_from_slice(row)),
        }
        Ok(())
    }
}

/// What a group of 4-bit codes is scaled by and added to, and where in its word.
pub(super) const FACTORS: [(&str, usize); 2] = [("scale", 0), ("offset", 2)];

fn put(
    state: &mut SavedState,
    part: usize,
    name: &str,
    codes: Vec<u8>,
    shape: (usize, usize),
) -> Result<()> {
    state.put(part, name, Tensor::from_vec(codes, shape, &Device::Cpu)?);
    Ok(())
}

/// A tensor's values as they lie in memory.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::U8 => tensor.to_vec1::<u8>()?,
        DType::U32 => tensor.to_vec1::<u32>()?.into_iter().flat_map(u32::to_le_bytes).collect(),
        DType::BF16 => tensor.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        DType::F16 => tensor.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        _ => tensor.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RowDtype;

    /// Bytes that differ from place to place.
    fn noise(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| ((i * 131 + seed * 57 + i / 7) % 251) as u8).collect()
    }

    #[test]
    fn rows_come_back_to_the_byte() {
        for rows in [RowDtype::F32, RowDtype::Bf16, RowDtype::Int8, RowDtype::Int4] {
            for width in [64, 96, 128] {
                let plain = if rows == RowDtype::F32 { 4 } else { 2 };
                let coding = Coding::new(rows, width, plain);
                let (values, scales) =
                    (noise(5 * coding.value_bytes, 1), noise(5 * coding.scale_bytes, 2));
                let mut state = SavedState::default();
                let device = DeviceRows { values: &values[..], scales: &scales[..] };
                coding.save(&device, &mut state, 3, "k").unwrap();
                let (mut back, mut back_scales) = (vec![0; values.len()], vec![0; scales.len()]);
                let mut to = DeviceRows { values: &mut back[..], scales: &mut back_scales[..] };
                coding.restore(&mut state, (3, "k"), 5, &mut to).unwrap();
                assert_eq!((back, back_scales), (values, scales), "{rows:?} of {width}");
                state.check_all_taken().unwrap();
            }
        }
    }

    /// In what is saved, codes are in order: channel 17 of a row is in the high half of byte 8.
    #[test]
    fn codes_are_saved_in_order() {
        let coding = Coding::new(RowDtype::Int4, 64, 2);
        let mut values = vec![0; coding.value_bytes];
        // On the device in the high half of the byte that channel 1 has the low half of, which is byte 2.
        values[2] = 0x73;
        let scales = vec![0; coding.scale_bytes];
        let mut state = SavedState::default();
        let rows = DeviceRows { values: &values[..], scales: &scales[..] };
        coding.save(&rows, &mut state, 0, "k").unwrap();
        let codes = &state.into_tensors()["0.k"];
        let codes = codes.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let set: Vec<_> = codes.iter().enumerate().filter(|(_, byte)| **byte != 0).collect();
        assert_eq!(set, [(0, &0x30), (8, &0x70)]);
    }
}
