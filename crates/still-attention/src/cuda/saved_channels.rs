//! Keys that the device keeps coded by channel (`channel_codes.cuh` of `still-kernels`), and as every state saves them.
//!
//! Of 32 keys each channel has 16 bytes. On the device byte `i` has keys `i` (low half) and `i + 16`; a saved one has keys `2i` and `2i + 1`.

use candle_core::{DType, Device, Tensor};
use half::f16;

use super::saved_rows::{DeviceRows, FACTORS, GROUP_WORD, bytes};
use super::store::Coding;
use crate::config::FOUR_BIT_GROUP as GROUP;
use crate::cpu::channel_codes::{CHANNEL_OFFSET, CHANNEL_SCALE};
use crate::{Result, SavedState};

/// Bytes of a channel's codes.
const CHANNEL: usize = GROUP / 2;

/// Names of [`FACTORS`].
const NAMES: [&str; 2] = [CHANNEL_SCALE, CHANNEL_OFFSET];

/// Puts whole groups of keys among a state's tensors.
pub(super) fn save(
    coding: &Coding,
    keys: &DeviceRows<&[u8]>,
    state: &mut SavedState,
    part: usize,
    name: &str,
) -> Result<()> {
    let (width, cpu) = (coding.width, &Device::Cpu);
    let count = keys.values.len() / coding.value_bytes;
    let code = |of: &[u8], i: usize| of[i % CHANNEL] >> (i / CHANNEL * 4) & 15;
    let channels = keys.values.chunks_exact(CHANNEL);
    let codes: Vec<u8> = channels
        .flat_map(|of| (0..CHANNEL).map(move |i| code(of, 2 * i) | code(of, 2 * i + 1) << 4))
        .collect();
    state.put(part, name, Tensor::from_vec(codes, (count, width / 2), cpu)?);
    for (what, (_, at)) in NAMES.into_iter().zip(FACTORS) {
        let words = keys.scales.chunks_exact(GROUP_WORD);
        let halves = words.map(|word| f16::from_le_bytes([word[at], word[at + 1]])).collect();
        let halves = Tensor::from_vec(halves, (count / GROUP, width), cpu)?;
        state.put(part, &format!("{name}_{what}"), halves);
    }
    Ok(())
}

/// Takes `count` keys back, to the first of `to`.
pub(super) fn restore(
    coding: &Coding,
    state: &mut SavedState,
    (part, name): (usize, &str),
    count: usize,
    to: &mut DeviceRows<&mut [u8]>,
) -> Result<()> {
    let width = coding.width;
    let saved = state.take(part, name, DType::U8, &[Some(count), Some(width / 2)])?;
    let saved = bytes(&saved)?;
    let channels = saved.chunks_exact(CHANNEL).zip(to.values.chunks_exact_mut(CHANNEL));
    for (from, to) in channels {
        let code = |i: usize| from[i / 2] >> (i % 2 * 4) & 15;
        for (i, to) in to.iter_mut().enumerate() {
            *to = code(i) | code(i + CHANNEL) << 4;
        }
    }
    for (what, (_, at)) in NAMES.into_iter().zip(FACTORS) {
        let shape = [Some(count / GROUP), Some(width)];
        let saved = state.take(part, &format!("{name}_{what}"), DType::F16, &shape)?;
        let saved = bytes(&saved)?;
        let words = to.scales.chunks_exact_mut(GROUP_WORD);
        for (half, word) in saved.chunks_exact(2).zip(words) {
            word[at..at + 2].copy_from_slice(half);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RowDtype;

    #[test]
    fn keys_come_back_to_the_byte_and_are_saved_in_order() {
        let coding = Coding::new(RowDtype::Int4, 64, 2);
        let bytes = |len: usize| (0..len).map(|i| ((i * 131 + i / 7) % 251) as u8).collect();
        let values: Vec<u8> = bytes(96 * coding.value_bytes);
        let scales: Vec<u8> = bytes(96 * coding.scale_bytes);
        let mut state = SavedState::default();
        let keys = DeviceRows { values: &values[..], scales: &scales[..] };
        save(&coding, &keys, &mut state, 3, "k").unwrap();
        let saved = state.clone().into_tensors()["3.k"].flatten_all().unwrap();
        let saved = saved.to_vec1::<u8>().unwrap();
        // Channel 1 of the second group: keys 16 and 17 are in the high halves of its first two bytes on the device.
        let channel = (64 + 1) * 16;
        assert_eq!(saved[channel + 8], values[channel] >> 4 | values[channel + 1] & 0xf0);
        let (mut back, mut back_scales) = (vec![0; values.len()], vec![0; scales.len()]);
        let mut to = DeviceRows { values: &mut back[..], scales: &mut back_scales[..] };
        restore(&coding, &mut state, (3, "k"), 96, &mut to).unwrap();
        assert_eq!((back, back_scales), (values, scales));
        state.check_all_taken().unwrap();
    }
}
